dtvla collect env=libero_goal env.task_ids=[1] episodes=100 env.render=draft
dtvla train -m +experiment=quickstart env.task_ids=[1] seed=0,1,2 model/decoder=hybrid,autoregressive +thoughts=with,without \
  hydra/launcher=joblib
R=outputs/runs/quickstart-model.decoder
for seed in 0 1 2; do for thoughts in with without; do
  dtvla evaluate -m checkpoint=${R}_hybrid+seed_$seed+thoughts_$thoughts/policy,${R}_autoregressive+seed_$seed+thoughts_$thoughts/policy \
    cot=$([ $thoughts = with ] && echo think || echo none) env=libero_goal env.task_ids=[1] env.render=draft record=0 seed=[0,1,2] \
    init_states=[30,31,32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,49]
done; done
dtvla report outputs/evaluations
