python tools/stepping_agreement.py episodes.jsonl --suite libero_object
python tools/stepping_agreement.py episodes.jsonl --suite libero_spatial --tasks 0 1 2 3 5 6 7 8 9
python tools/stepping_agreement.py episodes.jsonl --suite libero_goal --tasks 1 2 4 6 8 9
python tools/stepping_agreement.py episodes.jsonl --suite libero_10 --tasks 0 1 2 3 4 5 6 7 8 --episodes 2
python tools/stepping_agreement.py episodes.jsonl --suite libero_90 --tasks 19 43 67 --episodes 2
python tools/stepping_agreement.py episodes.jsonl --summary > agreement.json
