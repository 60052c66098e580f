dtvla benchmark rollout env=libero_object                                # rollout-libero_object.json
dtvla benchmark parity env=libero_object                                 # parity-libero_object.json: ten tasks
dtvla benchmark rollout env=libero_object 'env.task_ids=[0,3,6]' 'renders=[full]' 'steppings=[exact]' 'workers=[1]' episodes=1 growth_episodes=500   # growth-libero_object.json
python tools/kill_workers.py --episodes 200 --every 3 --out kills.json
