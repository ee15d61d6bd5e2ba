#!/usr/bin/env bash
# A small study on a real Slurm of one node with two CPUs by run_all.sh --slurm: arrays with dependencies, a pre-training
# that gets the signal of a time limit and comes back, a task ended by scancel; then the same study by run_all.sh alone.
# Starts its own munged, slurmctld and slurmd, and ends them.
#
#   bash tests/slurm_study.sh FOLDER       FOLDER: new, gets data/, slurm/, plain/ and facts.csv (fact,value)
#
# Needs Debian's slurm-wlm and munge, or the like; no rights but one's own.
set -eu
folder=$(realpath -m "${1:?name a new folder}")
cd "$(dirname "$0")/.."
node=$(hostname -s)
PATH=$PATH:/usr/sbin:/sbin
mkdir -p "$folder"
spool=$(mktemp -d /tmp/slurm.XXXXXX) && chmod 711 "$spool"  # short: a socket's path has at most 107 bytes
export SLURM_CONF=$spool/slurm.conf OMP_NUM_THREADS=1
say() { echo "$(date +%T) $*"; }
fact() { echo "$1,$2" >> "$folder/facts.csv"; say "$1: $2"; }
fail() { echo "slurm_study.sh: $*" >&2; exit 1; }
waited() {  # seconds what command...: poll until the command succeeds
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@"; do [ $SECONDS -lt $end ] || fail "waited in vain for $what"; sleep 0.5; done
}

# ---------------------------------------------------------------- a cluster of one node
port=$((20000 + $$ % 10000))
cat > "$SLURM_CONF" <<CONF
ClusterName=cells
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$spool/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
StateSaveLocation=$spool/state
SlurmdSpoolDir=$spool/spool
SlurmctldPidFile=$spool/slurmctld.pid
SlurmdPidFile=$spool/slurmd.pid
SlurmctldLogFile=$spool/slurmctld.log
SlurmdLogFile=$spool/slurmd.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
MinJobAge=3600
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=cpu Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
mkdir "$spool/state" "$spool/spool"
daemons=()
ended() {  # the jobs first, then slurmd, slurmctld, munged
  trap - EXIT
  scancel -u "$(id -un)" 2>/dev/null || true
  for ((i = 0; i < 40; i++)); do [ "$(squeue -h 2>/dev/null)" ] || break; sleep 0.5; done
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do kill "${daemons[$i]}" 2>/dev/null || true; wait "${daemons[$i]}" 2>/dev/null || true; done
  cp "$spool"/*.log "$folder" 2>/dev/null || true
  rm -rf "$spool"
}
trap ended EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
(umask 077; head -c 1024 /dev/urandom > "$spool/munge.key")
munged --foreground --force --socket="$spool/munge.socket" --key-file="$spool/munge.key" --pid-file="$spool/munged.pid" \
  --log-file="$spool/munged.log" --seed-file="$spool/munge.seed" 2> /dev/null & daemons+=($!)
waited 20 munged test -S "$spool/munge.socket"
slurmctld -D -f "$SLURM_CONF" 2> /dev/null & daemons+=($!)
slurmd -D -f "$SLURM_CONF" 2> /dev/null & daemons+=($!)
idle() { [ "$(sinfo -h -o %T 2>/dev/null)" = idle ]; }
waited 60 "Slurm's node" idle
fact version "$(sinfo --version)"

# ---------------------------------------------------------------- the study, with a CPU instead of a GPU
options="--epochs 24 --image-size 32 --batch-size 32 --lr 0.02 --amp off --workers 0 --device cpu"
export SBATCH="--cpus-per-task=1 --time=60" OVERLAPS=no
export DATA=$folder/data MODELS=shufflenet_v2_x0_5 INITS="random cd" FOLDS="0 1,2"
python=$(command -v python || command -v python3)
"$python" tests/demo_data.py --out "$DATA" --size tiny --sets bm
state() { bash run_all.sh --list | awk -v n="$1" '$1 == n {print $2}'; }
number() { bash run_all.sh --list | grep -F -e "$1" | cut -d ' ' -f 1; }
no_queue() {
  squeue -h -o %r | grep -q DependencyNeverSatisfied && fail "a pre-training failed: $(tail -n 2 "$RUNS"/logs/pretrain-*.log)"
  [ -z "$(squeue -h)" ]
}
export RUNS=$folder/slurm

# the pre-training's images: 1,500 links to bone marrow cells, so that its 24 epochs take a while
"$python" - "$DATA" <<'PYTHON'
import pathlib, sys
data = pathlib.Path(sys.argv[1])
images = [image for label in ("NGB", "LYT", "EOS", "MYB") for image in sorted(data.glob(f"bm/*/{label}/**/*.jpg"))]
for i in range(1500 // len(images)):
    for image in images:
        link = data / "cd" / image.relative_to(data / "bm").parts[1] / f"{i}-{image.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
PYTHON
early=$(number 'train.py --model shufflenet_v2_x0_5 --init cd --fold 0 ')
start=$SECONDS status=0
bash run_all.sh --task "$early" $options > "$folder/early.log" 2>&1 || status=$?
fact "status before its pre-training" "$status in $((SECONDS - start)) s"

say "$(bash run_all.sh --list)"
bash run_all.sh --slurm $options
victim=$(number '--init random --fold 1 2 ') first=$(number ' pretrain.py ')
slurms() { squeue -h -r -t R -o '%F_%K' | grep "_$1\$"; }   # its number of job N of --list
begun() { [ "$(slurms "$1")" ] && [ "$(cat "$RUNS/$2/log.csv" 2> /dev/null | wc -l)" -ge 2 ]; }
waited 300 "an epoch of task $victim" begun "$victim" train/shufflenet_v2_x0_5/random/fold1
scancel "$(slurms "$victim")"
waited 300 "an epoch of the pre-training" begun "$first" pretrain/shufflenet_v2_x0_5/cd
scancel --batch --signal=USR1 "$(slurms "$first")"       # as Slurm does two minutes before the time is over
waited 900 "the queue to be empty" no_queue
fact "state after scancel" "$(state "$victim")"
fact "restarts of the pre-training" "$(scontrol show job -o | grep "ArrayTaskId=$first " | sed 's/.* Restarts=\([0-9]*\).*/\1/')"
fact "restarts of the cancelled" "$(scontrol show job -o | grep "ArrayTaskId=$victim " | sed 's/.* Restarts=\([0-9]*\).*/\1/')"
bash run_all.sh --slurm $options
waited 900 "the queue to be empty" no_queue
fact "states in the end" "$(bash run_all.sh --list | awk '{print $2}' | sort | uniq -c | xargs)"
"$python" evaluate.py --runs "$RUNS" > "$folder/evaluate.log"

# ---------------------------------------------------------------- the same by run_all.sh alone
start=$SECONDS
RUNS=$folder/plain JOBS_PER_GPU=2 bash run_all.sh $options > "$folder/plain.log" 2>&1 || fail "run_all.sh: $(tail -n 3 "$folder/plain.log")"
fact "seconds of plain run_all.sh" $((SECONDS - start))
