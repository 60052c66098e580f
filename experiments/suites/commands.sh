python tools/check_suites.py checked.json        # continues where the file ends; 4 to 10 s per task
