"""Chooses, trains and picks the best classifier for some data and their noise.

    data, machine ─ settings, costs, schedule ─▶ study ─ run ─▶ held-out scores ─ choice ─▶ run
"""
