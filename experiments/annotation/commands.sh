for task in "libero_object 0" "libero_spatial 2" "libero_goal 8"; do set -- $task
  dtvla collect env=$1 env.task_ids=[$2] episodes=20 env.render=draft root=outputs/data/$1_$2
done
dtvla collect env=libero_goal env.task_ids=[1] episodes=100 env.render=draft
for set in libero_object_0 libero_spatial_2 libero_goal_8 libero_goal_1; do
  dtvla annotate dataset=outputs/data/$set output=outputs/annotations/$set
done
python tools/measure_checks.py outputs/annotations/libero_{object_0,spatial_2,goal_1,goal_8}

D=outputs/data/libero_goal_1 A=outputs/annotations
dtvla annotate dataset=$D output=$A/keys frames=key keyframes.midpoints_beyond=8
dtvla review dataset=$A/keys
dtvla annotate dataset=$A/keys output=$A/reviewed annotator=none decisions=$A/keys.decisions.jsonl
dtvla train +experiment=annotator_nano data.root=$A/reviewed resume=true
dtvla annotate dataset=$A/keys output=$A/all annotator=policy annotator.checkpoint=outputs/runs/annotator_nano/policy decisions=$A/keys.decisions.jsonl
python tools/measure_annotator.py $A/all $A/libero_goal_1
