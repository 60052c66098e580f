dtvla collect env=libero_goal env.task_ids=[1] episodes=100 env.render=draft
dtvla train +experiment=quickstart name=start420 trainer.max_steps=420 resume=true
dtvla train +experiment=grpo_quickstart name=grpo_gain model.checkpoint=outputs/runs/start420/policy resume=true
for run in start420 grpo_gain; do for temperature in 0 1; do
  dtvla evaluate checkpoint=outputs/runs/$run/policy output=outputs/evaluations/$run-$temperature env=libero_goal env.task_ids=[1] \
    env.render=draft init_states=[30,31,32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,49] seed=[0,1,2,3,4,5,6,7,8,9] \
    cot.temperature=$temperature cot.action_temperature=$temperature
done; done
for temperature in 0 1; do  # greedy, then sampled as in training
  dtvla report outputs/evaluations/{start420,grpo_gain}-$temperature output=outputs/evaluations/temperature-$temperature.html
done
