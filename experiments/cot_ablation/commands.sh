dtvla collect env=libero_object episodes=40 env.render=draft root=outputs/data/libero_object
dtvla train +experiment=libero_object_nano resume=true
dtvla evaluate -m cot=think,mask,shuffle,random checkpoint=outputs/runs/libero_object_nano/policy env=libero_object env.render=draft \
  init_states=[30,31,32,33,34,35,36,37,38,39] output=outputs/evaluations/cot_ablation
dtvla report outputs/evaluations/cot_ablation
