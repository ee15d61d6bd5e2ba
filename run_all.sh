#!/usr/bin/env bash
# The whole study: pre-training, 5-fold fine-tuning of every configuration, tables, figures, one page.
#
#   bash run_all.sh                    go on where it stopped; several copies on the same runs folder share the jobs
#   bash run_all.sh --demo             the same on synthetic cells in demo/, minutes on a CPU
#   bash run_all.sh --list             one line a job: number, state, command
#   bash run_all.sh --task N           job N of that list alone (what a cluster's array runs)
#
# Environment: DATA (holds bm, cd, pcam), RUNS, MODELS, INITS, FOLDS ("0 1 2 3 4": a job each; "0,1,2": one job), GPUS
# ("0 1"), JOBS_PER_GPU. Every other argument goes to train.py and pretrain.py, e.g. --stop-lr 0.005 or --device cpu.
set -u
[ $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -ge 501 ] || { echo "run_all.sh: needs bash 5.1 or later, this is $BASH_VERSION" >&2; exit 1; }
cd "$(dirname "$0")" || exit 1
python=$(command -v python || command -v python3) || { echo "run_all.sh: no python found; activate the virtual environment" >&2; exit 1; }

wrong() { echo "run_all.sh: $1" >&2; exit 2; }
mode=run task="" device="" epochs=75 rest=()
while [ $# -gt 0 ]; do
  case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
  case $1 in
    --demo) DATA=demo/data RUNS=demo/runs MODELS=${MODELS:-"resnet18 shufflenet_v2_x1_0"} FOLDS=${FOLDS:-0,1,2,3,4}
            JOBS_PER_GPU=${JOBS_PER_GPU:-$(( $(nproc) < 4 ? $(nproc) : 4 ))} device=${device:-cpu} epochs=5 demo=yes
            rest=(--epochs 5 --image-size 32 --amp off --memory-format contiguous --workers 0 "${rest[@]}") ;;
    --list) mode=list ;;
    --task) mode=task task=${2:-}; shift ;;
    --device) device=${2:-}; shift ;;
    --epochs) epochs=${2:-}; rest+=("$1" "${2:-}"); shift ;;
    --help|-h) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --model|--init|--fold|--data|--runs) wrong "$1 is set by MODELS, INITS, FOLDS, DATA, RUNS in the environment" ;;
    *) rest+=("$1") ;;
  esac
  shift
done
[[ $mode != task || $task =~ ^[0-9]+$ ]] || wrong "--task '$task' is not a number of --list"
[[ $epochs =~ ^[1-9][0-9]*$ ]] || wrong "--epochs '$epochs' is not a whole number of at least 1"
[[ ${device:-cpu} =~ ^(cpu|cuda(:[0-9]+)?)$ ]] || wrong "--device '$device' is not cpu, cuda, cuda:1, ..."
[[ ${JOBS_PER_GPU:-1} =~ ^[1-9][0-9]*$ ]] || wrong "JOBS_PER_GPU='$JOBS_PER_GPU' is not a whole number of at least 1"
[[ ${FOLDS:-0} =~ ^[0-9,\ ]+$ ]] || wrong "FOLDS='$FOLDS' is not a list of numbers like '0 1 2' or '0,1,2'"
[[ ${GPUS:-0} =~ ^[0-9\ ]+$ ]] || wrong "GPUS='$GPUS' is not a list of numbers like '0 1'"
[[ ${INITS:-} != *=* ]] || wrong "INITS='$INITS': NAME=PATH is for train.py alone"
case $device in cuda:*) GPUS=${device#*:} device=cuda ;; esac  # each job sees one GPU, its number 0
export CUDA_DEVICE_ORDER=PCI_BUS_ID                            # nvidia-smi's numbers
export DATA=${DATA:-data} RUNS=${RUNS:-runs} MODELS=${MODELS:-} INITS=${INITS:-} FOLDS=${FOLDS:-0 1 2 3 4} EPOCHS=$epochs
logs=$RUNS/logs

# One line a job, tab-separated: number, state, name, seconds left, command. The order brings whole results every night: fold 0 of
# what needs no pre-training, the CD pre-trainings and what they feed, the PCam ones, then fold 1, ... Numbers never depend on states.
jobs_list() {
  "$python" - <<'PYTHON'
import csv, fcntl, os, pathlib, shlex, struct
data, runs, epochs = os.environ["DATA"], pathlib.Path(os.environ["RUNS"]), int(os.environ["EPOCHS"])
paper = not os.environ["MODELS"]
chosen = os.environ["MODELS"].split() or "vgg19_bn resnet152 regnet_y_32gf vit_l_32 resnext50_32x4d".split()
inits = os.environ["INITS"].split() or "random imagenet cd imagenet+cd pcam imagenet+pcam".split()
folds = os.environ["FOLDS"].split()

def train(init, fold):
    for model in chosen:
        if init == "random" or not (paper and model == "resnext50_32x4d"):  # Matek et al. trained their baseline from scratch
            yield "train", model, init, fold

def study():
    sources = sorted({i.split("+")[-1] for i in inits} - {"random", "imagenet"}, key=lambda s: (s != "cd", s))
    for number, fold in enumerate(folds):
        for init in inits:
            if init in ("random", "imagenet"):
                yield from train(init, fold)
        for source in sources:
            fed = [i for i in inits if i.split("+")[-1] == source]
            if number == 0:
                yield from (("pretrain", model, init, "") for init in fed for model in chosen
                            if not (paper and model == "resnext50_32x4d"))
            for init in fed:
                yield from train(init, fold)

def held(folder):
    try:
        with open(folder / "lock", "rb") as handle:
            query = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
            return struct.unpack("hhqqi4x", fcntl.fcntl(handle, fcntl.F_GETLK, query))[0] != fcntl.F_UNLCK
    except OSError:
        return False

def seconds(folder):
    try:
        with open(folder / "log.csv") as handle:
            return [float(row["seconds"]) for row in csv.DictReader(handle)]
    except (OSError, ValueError, KeyError):
        return []

jobs, measured = [], {}
for kind, model, init, fold in study():
    folders = [runs / kind / model / init / f"fold{f}" for f in fold.split(",")] if fold else [runs / kind / model / init]
    times = [seconds(folder) for folder in folders]
    for some in times:
        for key in ((kind, model), kind, ""):
            measured.setdefault(key, []).extend(some)
    jobs.append((kind, model, init, fold, folders, times))
for number, (kind, model, init, fold, folders, times) in enumerate(jobs, 1):
    name = f"{kind}-{model}-{init}" + (f"-fold{fold}" if fold else "")
    source = init.split("+")[-1]
    needs = kind == "train" and init not in ("random", "imagenet") and not (runs / "pretrain" / model / init / "predictions.csv").exists()
    done = [(folder / "predictions.csv").exists() for folder in folders]
    state = ("done" if all(done) else "running" if any(map(held, folders)) else "waits" if needs
             else "failed" if (runs / "logs" / f"{name}.failed").exists() else "todo")
    known = next((measured[key] for key in ((kind, model), kind, "") if measured.get(key)), [0])
    left = sum(max(0, epochs - len(t)) for t, d in zip(times, done) if not d) * sum(known) / len(known)
    command = ["train.py" if fold else "pretrain.py", "--model", model, "--init", init]
    command += ["--fold", *fold.split(",")] * bool(fold) + ["--data", f"{data}/{'bm' if fold else source}", "--runs", str(runs)]
    print(number, state, name, round(left), shlex.join(command), sep="\t")
PYTHON
}

if [ $mode = list ]; then
  jobs_list | while IFS=$'\t' read -r number state name left command; do
    printf '%-4s %-8s python %s\n' "$number" "$state" "$command${rest[*]:+ ${rest[*]}}"
  done
  exit
fi

# ---------------------------------------------------------------- before the night
if [ "${demo:-}" ] && ! "$python" tests/demo_data.py --out "$DATA" --size demo; then exit 1; fi
if [ -z "$device" ]; then
  command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU' || {
    echo "run_all.sh: no CUDA GPU found (nvidia-smi); bash run_all.sh --demo runs on synthetic cells here," \
      "--device cpu runs the study on the CPU, for months" >&2
    exit 1; }
  device=cuda
fi
seen=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')}
if [ "$device" = cuda ]; then GPUS=${GPUS:-$(xargs <<< "${seen//,/ }")}; else GPUS=cpu; fi
rest+=(--device "$device")
slots=()
for gpu in $GPUS; do for ((i = 0; i < ${JOBS_PER_GPU:-1}; i++)); do slots+=("$gpu"); done; done
export JOBS=${#slots[@]}
[ "$device" = cpu ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / JOBS > 0 ? $(nproc) / JOBS : 1 ))}
mkdir -p "$logs" || { echo "run_all.sh: cannot write to $RUNS; name another folder with RUNS" >&2; exit 1; }

start_job() {  # name gpu command...: in the background, its output in its log; $! is its process
  local name=$1 gpu=$2; shift 2
  rm -f "$logs/$name.failed"
  echo "--- $(date '+%F %T') python $*" >> "$logs/$name.log"
  if [ "$gpu" = cpu ]; then "$python" "$@" >> "$logs/$name.log" 2>&1 &
  else CUDA_VISIBLE_DEVICES=$gpu "$python" "$@" >> "$logs/$name.log" 2>&1 & fi
}

declare -A job_of=() slot_of=() gpu_of=() begun=()  # =(): bash's set -u takes a merely declared one for unbound
stopped() {  # Ctrl-C, SIGTERM: pass it on and wait, so that each job ends with its checkpoint whole
  trap '' INT TERM
  echo "run_all.sh: stopped; the same command goes on" >&2
  kill -TERM "${!job_of[@]}" 2>/dev/null
  wait
  exit "$1"
}
trap 'stopped 130' INT
trap 'stopped 143' TERM

if [ $mode = task ]; then
  line=$(jobs_list | awk -F'\t' -v n="$task" '$1 == n')
  [ "$line" ] || { echo "run_all.sh: --task $task: no such job; see --list" >&2; exit 2; }
  IFS=$'\t' read -r number state name left command <<< "$line"
  case $state in
    done) echo "job $task is done: $command"; exit 0 ;;
    waits) echo "job $task waits for its pre-training, which is not finished: $command" >&2; exit 1 ;;
  esac
  JOBS=1
  eval "words=($command)"  # quoted where a name has blanks
  start_job "$name" "${CUDA_VISIBLE_DEVICES:-$( [ "$device" = cpu ] && echo cpu || echo 0)}" "${words[@]}" "${rest[@]}"
  job_of[$!]=$name
  wait $!; status=$?
  [ $status = 0 ] || [ $status = 75 ] || [ $status -ge 128 ] || touch "$logs/$name.failed"
  [ $status = 0 ] || echo "job $task ended with status $status: $logs/$name.log" >&2
  exit $status
fi

# What can't be had here, all at once: lines "skip <init> <reason>" and "stop <reason>".
preflight() {
  jobs_list | env -u CUDA_VISIBLE_DEVICES "$python" -c '
import argparse, os, pathlib, shutil, sys, urllib.request
import models, train
data, runs, device, gpus, slots = *map(pathlib.Path, sys.argv[1:3]), *sys.argv[3:6]
jobs = [line.rstrip("\n").split("\t") for line in sys.stdin]
left = [job for job in jobs if job[1] != "done"]
parser = argparse.ArgumentParser("run_all.sh", "bash run_all.sh [options of train.py]", add_help=False)
train.add_options(parser)
for model in sorted({job[4].split()[2] for job in jobs}):
    try:
        models.check_name(model, parser.parse_args(["--model", model, *sys.argv[6:]]).image_size)
    except ValueError as error:
        parser.error(str(error))
pairs = {(job[4].split()[2], job[4].split()[4]) for job in left}
if left and not (data / "bm").is_dir():
    sys.exit(print(f"stop\t{data}/bm: the bone marrow cells are missing (README, Data); bash run_all.sh --demo runs on synthetic ones"))
for source in sorted({init.split("+")[-1] for _, init in pairs} - {"random", "imagenet"}):
    if not (data / source).is_dir():
        print(f"skip\t{source}\t{data}/{source} is missing")
for model in sorted({model for model, init in pairs if init.startswith("imagenet")}):
    url, file = models.imagenet_file(model)
    if not file.exists():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10)
        except OSError as error:
            print(f"skip\timagenet {model}\tno ImageNet weights of {model}: {url} cannot be reached and {file} is not there")
sizes = [4 * models.find_weights(job[4].split()[2], "DEFAULT").meta["num_params"] for job in left]
need, room = sum(sizes) + 4 * int(slots) * max(sizes, default=0), shutil.disk_usage(runs).free
if need > room:
    print(f"stop\t{runs}: {room / 1e9:.0f} GB free, the checkpoints still to come need about {need / 1e9:.0f} GB")
if device != "cpu":
    import torch
    for gpu in gpus.split():
        if gpu.isdigit() and int(gpu) >= torch.cuda.device_count():
            print(f"stop\tGPU {gpu} was asked for, PyTorch sees {torch.cuda.device_count()}")
    if shutil.disk_usage("/dev/shm").free < 1e9:
        print("stop\t/dev/shm has less than 1 GB free, too little for data workers (docker run --shm-size=8g)")
' "$DATA" "$RUNS" "$device" "$GPUS" "${#slots[@]}" "${rest[@]}"
}
missing=$(preflight) || exit $?
if grep -q '^stop' <<< "$missing"; then sed -n 's/^stop\t/run_all.sh: /p' <<< "$missing" >&2; exit 1; fi
skipped=$(awk -F'\t' '/^skip/ {print "skipped: every " $2 " initialisation, since " $3}' <<< "$missing")
[ "$skipped" ] && echo "$skipped"
is_skipped() {  # name of a job: does it need what is missing?
  awk -F'\t' -v name="$1" '/^skip/ {split($2, w, " "); if (w[1] == "imagenet" ? name ~ "-" w[2] "-imagenet" : name ~ "[-+]" w[1] "(-fold|$)") found = 1}
    END {exit !found}' <<< "$missing"
}

# ---------------------------------------------------------------- the night
refresh() { "$python" evaluate.py --runs "$RUNS"; "$python" report.py --runs "$RUNS" --data "$DATA/bm"; }
declare -A tries=() quick=() ended=()
refreshing="" worked="" total=0
while :; do
  list=$(jobs_list) next="" ours=" ${job_of[*]} " n_done=0 n_left=0 elsewhere="" seconds=0
  while IFS=$'\t' read -r number state name left command; do
    if [ "$state" = done ]; then n_done=$((n_done + 1)); continue; fi
    is_skipped "$name" && continue
    n_left=$((n_left + 1)) seconds=$((seconds + left))
    [[ $ours == *" $name "* || ${tries[$name]:-0} -ge 2 ]] && continue
    case $state in
      running) elsewhere=yes ;;
      todo|failed) # one that failed is tried again after all others
        if [ "${tries[$name]:-0}" = 1 ]; then again=${again:-$name$'\t'$command}
        elif [ -z "$next" ] && [ "${ended[$name]:-0}" -le $SECONDS ]; then next=$name$'\t'$command; fi
        [ "${ended[$name]:-0}" -gt $SECONDS ] && elsewhere=yes ;;
    esac
  done <<< "$list"
  [ -z "$next" ] && [ ${#job_of[@]} = 0 ] && next=${again:-}
  again="" free=""
  for i in "${!slots[@]}"; do [[ " ${slot_of[*]} " == *" $i "* ]] || { free=$i; break; }; done
  if [ "$next" ] && [ "$free" ]; then
    IFS=$'\t' read -r name command <<< "$next"
    eval "words=($command)"
    start_job "$name" "${slots[$free]}" "${words[@]}" "${rest[@]}"
    job_of[$!]=$name slot_of[$!]=$free gpu_of[$!]=${slots[$free]} begun[$!]=$SECONDS worked=yes
    minutes=$((seconds / ${#slots[@]} / 60)) about=""
    [ $seconds = 0 ] || about=", about $((minutes / 60)) h $((minutes % 60)) min"
    echo "$(date +%T) [$n_done done, ${#job_of[@]} running, $((n_left - ${#job_of[@]})) left$about] $name, log $logs/$name.log"
    continue
  fi
  if [ ${#job_of[@]} = 0 ]; then
    [ ${#slots[@]} = 0 ] && { echo "run_all.sh: no GPU is left that works" >&2; break; }
    [ "$elsewhere" ] || break
    sleep 5 & wait $!; continue  # another copy is at work on the rest
  fi
  wait -n -p pid "${!job_of[@]}"; status=$?
  name=${job_of[$pid]} gpu=${gpu_of[$pid]} took=$((SECONDS - begun[$pid]))
  unset "job_of[$pid]" "slot_of[$pid]" "gpu_of[$pid]"
  case $status in
    0) quick[$gpu]=0
       if [ -z "$refreshing" ] || ! kill -0 "$refreshing" 2>/dev/null; then refresh > "$logs/refresh.log" 2>&1 & refreshing=$!; fi ;;
    75) ended[$name]=$((SECONDS + 5)) ;;  # busy elsewhere: come back to it
    *) tries[$name]=$(( ${tries[$name]:-0} + 1 )); touch "$logs/$name.failed"
       echo "$(date +%T) failed (status $status): $name: $(grep -v '^ *$' "$logs/$name.log" | tail -n 1 | cut -c1-300)" >&2
       if [ $took -lt 120 ]; then quick[$gpu]=$(( ${quick[$gpu]:-0} + 1 )); fi
       if [ "${quick[$gpu]:-0}" -ge 3 ] && [ "$gpu" != cpu ]; then
         echo "run_all.sh: three jobs in a row failed quickly on GPU $gpu: it gets no more" >&2
         for i in "${!slots[@]}"; do [ "${slots[$i]}" = "$gpu" ] && unset "slots[$i]"; done
       fi ;;
  esac
done

# ---------------------------------------------------------------- the morning
[ "$refreshing" ] && wait "$refreshing"
trap - INT TERM
failed=$(jobs_list | awk -F'\t' '$2 == "failed" {print "failed: " $3}')
blocked=$(jobs_list | awk -F'\t' '$2 == "waits" {print $3}' | while read -r name; do
  is_skipped "$name" || echo "not run, its pre-training failed: $name"
done)
if [ -z "$worked" ] && [ -f "$RUNS/results/index.html" ]; then
  cat "$RUNS/results/table4.md"
  [ "$failed$blocked" ] || echo "Nothing left to do: $n_done jobs are done, see $RUNS/results/index.html"
else
  compare=()  # with the paper's table where the data are bone marrow cells
  [ "${demo:-}" ] || [ -z "$(find -L "$DATA/bm" -maxdepth 6 -type d -name FGC -print -quit)" ] || compare=(--compare paper/table4.csv)
  "$python" evaluate.py --runs "$RUNS" "${compare[@]}" || odd="evaluate.py found files that can't be right, see above"
  [ -f "$RUNS/results/table4.csv" ] || exit 1
  best=$(tail -n +2 "$RUNS/results/table4.csv" | LC_ALL=C sort -t, -k3,3nr -k8,8gr | head -n 1 | cut -d, -f1,2)  # as evaluate.best_run
  mapfile -t classes < <("$python" -c '
import csv, sys
names = [row["class"] for row in csv.DictReader(open(sys.argv[1], encoding="utf-8"))]
print(*([name for name in ("FGC", "BAS") if name in names] or names[:2]), sep="\n")  # Figs. 5 and 6, or two of other cells
' "$RUNS/results/table5_${best/,/_}.csv")
  [ "$device" = cpu ] || export CUDA_VISIBLE_DEVICES=${GPUS%% *}
  "$python" gradcam.py --model "${best%,*}" --init "${best#*,}" --classes "${classes[@]}" --runs "$RUNS" --data "$DATA/bm" --device "$device" \
    || odd="${odd:+$odd; }gradcam.py failed, see above"
  if "$python" report.py --runs "$RUNS" --data "$DATA/bm"; then echo "Open $RUNS/results/index.html"
  else odd="${odd:+$odd; }report.py failed, see above"; fi
fi
[ "$skipped" ] && echo "$skipped"
if [ "$failed$blocked${odd:-}" ]; then
  printf '%s\n' "$failed" "$blocked" "${odd:-}" | grep . >&2
  echo "run_all.sh: see $logs/<job>.log; the same command tries them again" >&2
  exit 1
fi
