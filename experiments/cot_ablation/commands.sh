dtvla collect env=libero_object episodes=40 env.render=draft root=outputs/data/libero_object
dtvla train +experiment=libero_object_nano resume=true
dtvla train +experiment=libero_object_nano resume=true seed=1 name=libero_object_nano-1
for run in libero_object_nano libero_object_nano-1; do
  dtvla evaluate -m cot=think,mask,shuffle,random checkpoint=outputs/runs/$run/policy env=libero_object env.render=draft \
    init_states=[30,31,32,33,34,35,36,37,38,39] output=outputs/evaluations/cot_ablation/$run
done
dtvla evaluate cot=random cot.length=36 checkpoint=outputs/runs/libero_object_nano-1/policy env=libero_object env.render=draft \
  init_states=[30,31,32,33,34,35,36,37,38,39] output=outputs/evaluations/cot_ablation/libero_object_nano-1/cot_random_36
dtvla report outputs/evaluations/cot_ablation
