python tools/quickstart.py --suite libero_goal --task 1 --episodes 100 --out outputs/quickstart
