#!/usr/bin/env bash
# The whole study: pre-training, 5-fold fine-tuning of every configuration, tables, figures, one page.
#
#   bash run_all.sh             everything; stop it, start it again, start it twice: as often as you like
#   bash run_all.sh --demo      the same on synthetic cells in demo/, minutes on a CPU
#   bash run_all.sh --list      one line a job: number, state, command
#   bash run_all.sh --task N    job N of that list alone
#   bash run_all.sh --slurm     submit what is left to Slurm: job arrays with their dependencies
#
# Environment: DATA (the folder of bm, cd, pcam), TARGET (the cells to fine-tune on, as --data; default DATA/bm),
# RUNS, MODELS, INITS, FOLDS ("0 1": a job each; "0,1": one; default: those of split.csv), GPUS ("0 1", or UUIDs),
# JOBS_PER_GPU, OVERLAPS (no: without overlaps.py), SBATCH (options of sbatch, "--partition=gpu --time=8:00:00",
# say). Paths are relative to where you call it. All other arguments go to train.py and pretrain.py.
set -u
say() { echo "run_all.sh: $1" >&2; }
fail() { say "$2"; exit "$1"; }
here=$(dirname "$(readlink -f "$0")")/
[ -f "${here}train.py" ] || fail 1 "no train.py beside $here: call run_all.sh where it lies (on Slurm with --slurm)"
[ ! "$here" -ef . ] || here=""
command -v python > /dev/null || fail 1 "no python found; activate the virtual environment (README)"

mode=night demo="" task="" device="" options=()
while [ $# -gt 0 ]; do
  case $1 in --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
  case $1 in
    --help|-h) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    --demo) demo=yes ;;
    --list|--slurm) mode=${1#--} ;;
    --task) mode=task task=${2:-}; shift ;;
    --device) device=${2:-}; shift ;;
    --model|--init|--fold|--data|--runs|--name) fail 2 "$1 is set by MODELS, INITS, FOLDS, TARGET, RUNS" ;;
    *) options+=("$1") ;;
  esac
  shift
done
if [ "$demo" ]; then
  DATA=demo/data TARGET=demo/data/bm RUNS=demo/runs MODELS=${MODELS:-"resnet18 shufflenet_v2_x1_0"} FOLDS=${FOLDS:-0,1,2,3,4}
  cores=$(nproc) JOBS_PER_GPU=${JOBS_PER_GPU:-$((cores < 4 ? cores : 4))} device=${device:-cpu}
  options=(--epochs 4 --image-size 56 --batch-size 16 --optimizer adamw --schedule cosine --lr 0.002 --amp off
           --memory-format contiguous --workers 0 "${options[@]}") INITS=${INITS:-random imagenet cd pcam}
fi
baseline=""                                            # Matek et al. trained theirs from random weights
[ "${MODELS:-}" ] || baseline=resnext50_32x4d
MODELS=${MODELS:-vgg19_bn resnet152 regnet_y_32gf vit_l_32}
INITS=${INITS:-random imagenet cd imagenet+cd pcam imagenet+pcam}
DATA=${DATA:-data} RUNS=${RUNS:-runs} JOBS_PER_GPU=${JOBS_PER_GPU:-1} TARGET=${TARGET:-$DATA/bm}
split_folds() { head -n 1 "$RUNS/split.csv" 2> /dev/null | grep -o 'fold[0-9]*' | tr -d fold | paste -sd ' '; }
asked=${FOLDS:-} FOLDS=${FOLDS:-$(split_folds)} FOLDS=${FOLDS:-0 1 2 3 4}
logs=$RUNS/logs page=$RUNS/results/index.html lacking=" "
[[ $mode != slurm || -z $demo ]] || fail 2 "--demo runs here, not on a cluster"
[[ $JOBS_PER_GPU =~ ^[1-9][0-9]*$ ]] || fail 2 "JOBS_PER_GPU='$JOBS_PER_GPU' is not a number from 1"
[[ $FOLDS =~ ^[0-9]+([ ,][0-9]+)*$ ]] || fail 2 "FOLDS='$FOLDS': numbers, with spaces or commas between"

# ---------------------------------------------------------------- jobs
study() {  # one line a job: kind, model, init, folds. Fold 0 of everything comes first: whole tables soon
  local fold init model first=yes
  for fold in $FOLDS; do
    for init in $INITS; do
      for model in $MODELS; do
        case $first$init in yesrandom|yesimagenet) ;; yes*) echo "pretrain $model $init" ;; esac
      done
      for model in $MODELS; do echo "train $model $init fold$fold"; done
      [ "$init" != random ] || [ -z "$baseline" ] || echo "train $baseline random fold$fold"
    done
    first=""
  done
  [ "${OVERLAPS:-}" = no ] || [ ! -f "${here}overlaps.py" ] || echo overlaps
}

describe() {  # sets kind, model, init, folds, log, ends (the last file of each run), args (given to python)
  local fold data=$TARGET
  read -r kind model init folds <<< "$1"
  log=$logs/${1// /-} folds=${folds#fold} ends=()
  for fold in ${folds//,/ }; do ends+=("$RUNS/train/$model/$init/fold$fold/predictions.csv"); done
  [ "$kind" != pretrain ] || ends=("$RUNS/pretrain/$model/$init/predictions.csv") data=$DATA/${init##*+}
  args=("$here$kind.py" --model "$model" --init "$init" ${folds:+--fold ${folds//,/ }})
  args+=(--data "$data" --runs "$RUNS" "${options[@]}" ${device:+--device "$device"})
  [ "$kind" != overlaps ] || ends=("$RUNS/groups.csv") args=("${here}overlaps.py" --data "$data" --runs "$RUNS")
}

finished() { local end; for end in "${ends[@]}"; do [ -f "$end" ] || return 1; done; }

state() {  # sets now; waits: for its pre-training; blocked: that failed; missing: data or ImageNet weights
  describe "$1"
  now=todo
  if finished; then now="done"
  elif [ -f "$log.lock" ] && { flock -n -E 75 "$log.lock" true 2> /dev/null; [ $? = 75 ]; }; then now=running
  elif [ -f "$log.busy" ] && [ "$(find "$log.busy" -mmin -5)" ]; then now=running    # by hand, elsewhere
  elif [ -f "$log.failed" ]; then now=failed
  elif [ "$kind" = pretrain ] && [ ! -d "$DATA/${init##*+}" ]; then now=missing
  elif [[ $kind$init =~ ^trainimagenet$|^pretrainimagenet && $lacking = *" $model "* ]]; then now=missing
  elif [ "$kind" = train ] && [ "$init" != random ] && [ "$init" != imagenet ]; then
    state "pretrain $model $init"
    case $now in done) now=todo ;; failed) now=blocked ;; missing) ;; *) now=waits ;; esac
  fi
}

states() { local job now; study | while read -r job; do state "$job"; echo "$now $job"; done; }
left() { states | grep -v '^done\|^missing'; }

progress() {  # how many runs are done, and how long the others will take, by the seconds in log.csv
  local job
  states | grep -v '^missing\|overlaps$' | while read -r _ job; do
    describe "$job"
    printf "$kind $model\t%s\n" "${ends[@]%/*}"
  done | awk -F '\t' -v slots="${CELLS_JOBS:-1}" '
    {
      seconds = 0
      while ((getline line < ($2 "/log.csv")) > 0) { split(line, cell, ","); seconds += cell[7] }
      if ((getline line < ($2 "/predictions.csv")) < 0) { others++; more[$1]++; begun += seconds; next }
      done++; all += seconds; count[$1]++; sum[$1] += seconds
    }
    END {
      for (k in more) time += more[k] * (count[k] ? sum[k] / count[k] : all / (done + !done))
      time = (time - begun) / slots
      printf "%d runs done, %d to go", done, others
      if (time > 0) printf ", about %d h %02d min", time / 3600, time / 60 % 60 }'
}

# ---------------------------------------------------------------- running
run_job() {  # GPU, job: run it with its output in its log; its exit status, or 75 if it is running already
  local status
  describe "$2"
  export CUDA_VISIBLE_DEVICES=${1#cpu}
  exec 9> "$log.lock"
  flock -w 0.5 -E 75 9 2> /dev/null; [ $? != 75 ] || return 75
  if finished || [ -f "$log.failed" ]; then exec 9>&-; return 75; fi      # by another worker just now
  rm -f "$log.busy"
  echo "$(date +%T) [$(progress)] ${log##*/}, log $log.log${CUDA_VISIBLE_DEVICES:+, GPU $1}"
  echo "--- $(date '+%F %T') python ${args[*]}" >> "$log.log"
  python "${args[@]}" >> "$log.log" 2>&1 9>&- &
  wait $!; status=$?
  [ $status != 0 ] || finished || status=1
  if [ $status = 75 ]; then touch "$log.busy"          # run by hand: looked at again in five minutes
  elif [ $status != 0 ]; then
    touch "$log.failed"
    say "failed (status $status): ${log##*/}: $(grep -v '^ *$' "$log.log" | tail -n 1 | cut -c 1-300)"
  fi
  exec 9>&-
  return $status
}

results() {  # tables and page; the paper's table beside if the cells are bone marrow; heatmaps if asked
  local paper="" status=0 where=(--runs "$RUNS" --data "$TARGET")
  [ "$demo" ] || paper=$(grep -m 1 ',FGC,' "$RUNS/split.csv")
  python "${here}evaluate.py" --runs "$RUNS" ${paper:+--compare "${here}paper/table4.csv"} || return
  [ "${1:-}" != heatmaps ] || python "${here}gradcam.py" "${where[@]}" --device "$device" || status=1
  python "${here}report.py" "${where[@]}" && echo "Open $page" && return $status
}

refresh() { (  # the results so far, unless another worker is at it
  flock -n -E 75 9 2> /dev/null; [ $? = 75 ] || results
) 9> "$logs/refresh.lock" > "$logs/refresh.log" 2>&1; }

stop() {  # end what this shell started; each run keeps its last checkpoint
  trap "" INT TERM USR1
  kill -TERM $(jobs -p) 2> /dev/null
  wait
}

work() {  # one worker of GPU $1: takes the first job that can be done, until nothing is left
  local now job
  trap "" INT; trap "stop; exit 143" TERM              # Ctrl-C reaches run_all.sh, which sends TERM
  while now=$(states | grep '^todo\|^running'); do
    job=$(grep -m 1 '^todo' <<< "$now") || { sleep 5 & wait $!; continue; }
    run_job "$1" "${job#todo }"
    case $? in 0) [ "$demo" ] || refresh & ;; 2) kill -USR1 $$; break ;; esac    # 2: wrong arguments, for every job
  done
  wait
}

submit() {  # job numbers, a pre-training to wait for: an array that Slurm requeues at a time-out; its number
  call=$(printf ' %q' "${here}run_all.sh" "${options[@]}" ${device:+--device "$device"})
  sbatch --parsable --job-name=cells --array="$1" ${2:+--dependency=afterok:$2 --kill-on-invalid-dep=yes} \
    --cpus-per-task=8 $([ "$device" = cpu ] || echo --gres=gpu:1) --time=24:00:00 --signal=B:USR1@120 \
    --requeue --open-mode=append --output="$logs/slurm-%A_%a.out" ${SBATCH:-} \
    --wrap="exec bash$call --task \$SLURM_ARRAY_TASK_ID" && echo "submitted: jobs $1" >&2
}

# ---------------------------------------------------------------- what was asked for
if [ $mode = list ]; then
  states | cat -n | while read -r number now job; do
    describe "$job"
    printf '%-4s %-8s python%s\n' "$number" "$now" "$(printf ' %q' "${args[@]}")"
  done
  exit
fi
job=$(study | awk -v n="$task" 'NR == n')
[ $mode != task ] || [ "$job" ] || fail 2 "--task '$task': no such job; see --list"
mkdir -p "$logs" 2> /dev/null || fail 1 "cannot write to $RUNS; name another folder with RUNS"
if [ "$demo" ]; then
  python "${here}tests/demo_data.py" --out "$DATA" --size demo || exit 1
  echo "A demonstration: a program drew these cells; small networks trained for minutes." > "$RUNS/note.txt"
fi
gpus=(cpu)
if [ "$device" != cpu ] && [ $mode != slurm ]; then
  export CUDA_DEVICE_ORDER=PCI_BUS_ID                  # nvidia-smi's numbers
  seen=$(nvidia-smi -L 2> /dev/null)
  seen=$(grep -o 'MIG-[^)]*' <<< "$seen" || sed -n 's/^GPU \([0-9]*\):.*/\1/p' <<< "$seen")
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || GPUS=""         # sbatch hands it on; Slurm's own allocation holds
  GPUS=${GPUS:-${CUDA_VISIBLE_DEVICES-$seen}} gpus=(${GPUS//,/ })
  [[ $device != cuda:* ]] || gpus=(${gpus[${device#*:}]:-})     # each job sees one GPU, its number 0
  [ ${#gpus[@]} -gt 0 ] || fail 1 "no CUDA GPU found; try --demo, or --device cpu, for months"
  device=cuda
fi

if [ $mode = task ]; then
  rm -f "$logs/${job// /-}.failed"
  state "$job"
  [ "$now" != "done" ] || { echo "job $task is done"; exit; }
  [[ $now != @(waits|blocked) ]] || fail 1 "job $task waits for its pre-training, which is not finished"
  trap 'stop; exit 130' INT; trap 'stop; exit 143' TERM
  trap 'stop; scontrol requeue "${SLURM_ARRAY_JOB_ID}_$task"; exit 143' USR1     # Slurm: its time is over
  run_job "${gpus[0]}" "$job" || exit
  if left > /dev/null; then refresh; else results heatmaps; fi
  exit 0                                               # whatever became of the tables
fi

left > /dev/null || [ ! -f "$page" ] || [ "$(find "$RUNS" -name predictions.csv -newer "$page")" ] ||
  { echo "Nothing left to do: see $page"; exit; }
[[ -e $TARGET || $TARGET = *[*{]* ]] || fail 1 "$TARGET is missing (DATA, TARGET; README); --demo draws its cells"
[ -f "$RUNS/split.csv" ] || python "${here}splits.py" --data "$TARGET" --out "$RUNS/split.csv" > /dev/null || exit
FOLDS=${asked:-$(split_folds)}
for init in $(states | awk '$1 == "missing" && $2 == "pretrain" {print $4}' | sort -u); do
  echo "skipped: $init, since $DATA/${init##*+} is missing"
done
for model in $(left | awk '$4 == "imagenet" || $2 $4 ~ /^pretrainimagenet/ {print $3}' | sort -u); do
  python "${here}models.py" --fetch "$model" || { echo "skipped: ImageNet weights of $model"; lacking+="$model "; }
done
need=$(left | awk '{ mb = $3 ~ /vgg|regnet/ ? 570 : $3 ~ /vit/ ? 1230 : $3 ~ /152/ ? 240 : 50   # of a best.pt
  all += mb * split($5 ".", folds, ","); if (mb > most) most = mb } END { print int(all + 6 * most) }')
room=$(df -Pk "$RUNS" | awk 'END { print int($4 / 1024) }')
[ "$need" -lt "$room" ] || fail 1 "$RUNS: $room MB free, its checkpoints need about $need MB"

if [ $mode = slurm ]; then
  table=$(states)
  numbers() { grep -n "$1" <<< "$table" | cut -d : -f 1 | paste -sd ,; }
  free=$(numbers '^\(todo\|failed\|running pretrain\)')
  [ -z "$free" ] || array=$(submit "$free") || exit
  while IFS=": " read -r number _ _ model init; do     # each pre-training, then what waits for it
    fed=$(numbers "^\(waits\|blocked\) train $model $init ")
    [ -z "$fed" ] || submit "$fed" "${array}_$number" > /dev/null || exit
  done < <(grep -n '^\(todo\|failed\|running\) pretrain' <<< "$table")
  exit
fi

# ---------------------------------------------------------------- the night
trap 'say "stopped; the same command resumes"; stop; exit 130' INT
trap 'say "stopped; the same command resumes"; stop; exit 143' TERM
trap 'stop; exit 2' USR1
export CELLS_JOBS=$((${#gpus[@]} * JOBS_PER_GPU))      # train.py shares the cores out
[ "$device" != cpu ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + CELLS_JOBS - 1) / CELLS_JOBS))}
flock -n -E 75 "$logs/refresh.lock" true 2> /dev/null
[[ $? = 0 || $? = 75 ]] || say "cannot lock files in $logs: without"
for attempt in first second; do                        # what failed is tried once more, after everything else
  rm -f "$logs"/*.failed
  for gpu in "${gpus[@]}"; do for ((i = 0; i < JOBS_PER_GPU; i++)); do work "$gpu" & done; done
  wait
  left > /dev/null || break
done
trap - INT TERM
export CUDA_VISIBLE_DEVICES=${gpus[0]#cpu}
results heatmaps; status=$?
! left >&2 || fail 1 "not done: the above; see $logs"
exit $status
