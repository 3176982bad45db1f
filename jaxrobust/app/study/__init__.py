"""Plans, runs, resumes and reads studies: comparisons of runs."""
