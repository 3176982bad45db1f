"""``python -m jaxrobust``: as the command ``jaxrobust``."""

from jaxrobust.app.cli import main

if __name__ == "__main__":
    main()
