#!/bin/bash
# What every launcher does in its job: bash slurm/body.sh VERB WORDS...
#
# Checks on the batch host what can be checked, starts the ranks, waits, and starts the job again under its own id where
# `swiftv2 job` says that this helps. docs/slurm.md explains; what a centre differs in stands in slurm/sites/.
set -o pipefail

say() { echo "swiftv2: $(date '+%F %T') $*" >&2; }
fail() {
    say "$1"
    exit "${2:-1}"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -n "${SLURM_JOB_ID:-}" ] || fail "slurm/body.sh is the body of a job: give \`sbatch slurm/pretrain_806M.sh ...\`" 2
# The number of an array's last element is that of the whole array: by it all elements would be requeued.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restart=${SLURM_RESTART_COUNT:-0}
export SWIFTV2_ROOT=$root SLURM_RESTART_COUNT=$restart

site=${SWIFTV2_SITE:-}
[ -n "$site" ] || { [ "${NERSC_HOST:-}" = perlmutter ] && site=perlmutter; } || site=local
[ -f "$site" ] || site=$root/slurm/sites/$site.env
[ -f "$site" ] || fail "SWIFTV2_SITE=${SWIFTV2_SITE:-}: there is no site $site; sites are $(cd "$root/slurm/sites" && echo *.env)" 2
# shellcheck source=/dev/null
. "$site" || fail "$site could not be read to its end" 2

[ ! -d "$root/swiftv2" ] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
for module in ${SWIFTV2_MODULES:-}; do
    module load "$module" || fail "module load $module failed: \`module avail\` lists what there is; SWIFTV2_MODULES in $site names it"
done
python=${SWIFTV2_PYTHON:-python3}
command -v "$python" >/dev/null || [ "${SWIFTV2_RUNTIME:-python}" != python ] ||
    fail "SWIFTV2_PYTHON=$python is not there: name the interpreter that swiftv2 is installed for"
case ${SWIFTV2_RUNTIME:-python} in
python) inside=() ;;
shifter) inside=(shifter "--image=${SWIFTV2_IMAGE:?name the image: export SWIFTV2_IMAGE=...}" "--module=gpu,nccl-plugin") ;;
podman-hpc)
    inside=(podman-hpc run --rm --gpu --nccl --net=host --ipc=host --pid=host --workdir "$PWD" --volume "$PWD:$PWD" --volume "$root:$root")
    [ -z "${SCRATCH:-}" ] || inside+=(--volume "$SCRATCH:$SCRATCH")
    for names in 'SLURM*' 'SWIFTV2_*' 'NCCL_*' 'FI_*' 'TORCH_*' 'PYTORCH_*' 'OMP_*' 'GLOO_*' PYTHONPATH; do inside+=(--env "$names"); done
    inside+=("${SWIFTV2_IMAGE:?name the image: export SWIFTV2_IMAGE=...}")
    ;;
*) fail "SWIFTV2_RUNTIME=$SWIFTV2_RUNTIME: take python, shifter or podman-hpc ($site)" 2 ;;
esac
swiftv2() { "${inside[@]}" "$python" -m swiftv2 "$@"; }

if [ -n "${SWIFTV2_NCCL_PLUGIN:-}" ]; then
    "${inside[@]}" "$python" -c "import ctypes; ctypes.CDLL('$SWIFTV2_NCCL_PLUGIN')" ||
        fail "$SWIFTV2_NCCL_PLUGIN cannot be loaded: NCCL would fall back to slow TCP; load its module, or mend SWIFTV2_NCCL_PLUGIN in $site"
fi

# Newer Slurms set it themselves.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    end=$(SLURM_TIME_FORMAT=%s timeout 60 squeue --noheader --jobs "$job" --format %e) || end=
    case $end in
    *[!0-9]* | '') say "the end of job $job is not known: ranks stop by Slurm's signal alone" ;;
    *) export SLURM_JOB_END_TIME=$end ;;
    esac
fi

# Where nodes have names that only Slurm knows, their ranks meet at the address that it has for the first of them.
first=$(timeout 60 scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ -z "${MASTER_ADDR:-}" ] && ! getent hosts "$first" >/dev/null; then
    MASTER_ADDR=$(timeout 60 scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    [ -n "$MASTER_ADDR" ] || fail "the first node, $first, has no address that this one knows: export MASTER_ADDR"
    export MASTER_ADDR
fi

verb=$1
# In the shell of a task: private caches, the order of devices, no MPI. In Slurm 22 and later srun takes no
# --cpus-per-task from the job.
step=(srun "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=600)
read -r -a options <<<"${SWIFTV2_SRUN:-}"
step+=("${options[@]}")
if [ "$verb" = store ]; then
    step+=("--mpi=${SWIFTV2_MPI:-pmi2}")
else
    step+=(--mpi=none)
fi

if [ -n "${SWIFTV2_PACKAGES:-}" ]; then
    [ -f "$SWIFTV2_PACKAGES" ] || fail "SWIFTV2_PACKAGES=$SWIFTV2_PACKAGES is not there: make it (docs/perlmutter.md), or unset it"
    "${step[@]}" "--ntasks=$SLURM_NNODES" --ntasks-per-node=1 bash "$root/slurm/stage.sh" ||
        fail "$SWIFTV2_PACKAGES could not be unpacked on every node"
    export PYTHONPATH=${SWIFTV2_NODE_LOCAL:-/tmp}/swiftv2-$SLURM_JOB_ID/$SLURMD_NODENAME/packages${PYTHONPATH:+:$PYTHONPATH}
fi
lacks=$("${inside[@]}" "$python" -c 'import importlib.util, swiftv2.cli
print(*(name for name in ("torch", "deepspeed", "zarr") if importlib.util.find_spec(name) is None))' 2>&1 | tail -n 1)
[ -z "$lacks" ] || fail "$python lacks packages of swiftv2 ($lacks): install them there, or name another one as SWIFTV2_PYTHON"

words=("$@")
given=("${@:3}") # what `sbatch` was given behind the launcher, which itself says two words, or one
case $verb in
pretrain)
    # What the site sets for all runs comes before what was given, so that this has the last word.
    read -r -a usual <<<"${SWIFTV2_WORDS:-}"
    words=("$1" "$2" "${usual[@]}" "${given[@]}")
    ;;
sweep) given=("${@:2}") ;;
esac
answer=$(swiftv2 job begin "${words[@]}") || exit $?
mapfile -t lines <<<"$answer"
target=${lines[0]}
mark=${lines[1]}
command=("${lines[@]:2}")
most=${SWIFTV2_MOST_REQUEUES:-30}
# What starts this once more, when the job itself is gone: the run directory's resume.sh.
script=$(timeout 60 scontrol show job "$job" | sed -n 's/^ *Command=//p')
[ "$script" = "${script%%.sh *}" ] || script=${script%%.sh *}.sh
SWIFTV2_SUBMITTED=$(printf '%q ' sbatch "--nodes=$SLURM_NNODES" "--ntasks-per-node=${SLURM_NTASKS_PER_NODE:-1}" \
    ${SLURM_ARRAY_TASK_ID:+"--array=$SLURM_ARRAY_TASK_ID"} "$script" "${given[@]}")
export SWIFTV2_SUBMITTED SWIFTV2_SITE_FILE=$site
say "job $job, start $((restart + 1)), ${SLURM_NNODES} nodes ($SLURM_JOB_NODELIST), site $site: $target from $mark"

requeue() { # with the hosts to leave out, or nothing
    # Slurm ends this script while it requeues the job; the second command must still be given.
    trap '' TERM
    timeout 60 scontrol requeue "$job" || fail "job $job cannot be requeued: give its \`sbatch\` line again to go on" 75
    if [ -n "$1" ]; then
        local before hosts=$1
        before=$(timeout 60 scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
        [ -z "$before" ] || [ "$before" = "(null)" ] || hosts=$before,$hosts
        timeout 60 scontrol update "JobId=$job" "ExcNodeList=$hosts" || say "ExcNodeList=$hosts was not taken: doctor looks again"
    fi
    sleep 300
    exit 75
}

# A node that Slurm has lost sight of lives on, and this script on it: the job may be running elsewhere by now.
stay() {
    local record
    record=$(timeout 60 scontrol show job --oneliner "$job") || fail "Slurm does not tell of job $job: nothing more is done here"
    case " $record " in
    *" JobState=RUNNING "*) ;;
    *) [ ${#cancelled[@]} -gt 0 ] || fail "job $job is no longer running for Slurm: nothing more is done here" ;;
    esac
    case " $record " in
    *" Restarts=$restart "*" BatchHost=$SLURMD_NODENAME "*) ;;
    *) fail "job $job has been given another start: nothing more is done here" ;;
    esac
}

judge() { # with the status, and further words for `job end`
    local hosts verdict status=$1
    shift
    stay
    hosts=$(swiftv2 job end "$verb" "$target" --status "$status" --mark "$mark" --most "$most" "$@")
    verdict=$?
    [ "$verdict" -ne 75 ] || requeue "$hosts"
    exit "$verdict"
}

cancelled=()
doctor=${SWIFTV2_DOCTOR:-quick}
[ "$SLURM_NNODES" -gt 1 ] || doctor=off
if [ "$verb" != store ] && [ "$doctor" != off ]; then
    report=$target/logs/doctor-$job-$restart.json
    depth=()
    [ "$doctor" = full ] || depth=(--quick)
    "${step[@]}" "${inside[@]}" bash "$root/slurm/rank.sh" "$python" -m swiftv2 doctor "${depth[@]}" --json "${command[@]:1}" >"$report"
    status=$?
    [ "$status" -eq 0 ] || judge "$status" --doctor "$report"
fi

"${step[@]}" "${inside[@]}" bash "$root/slurm/rank.sh" "$python" -m swiftv2 "${command[@]}" &
ranks=$!
trap 'kill -USR1 "$ranks"' USR1
trap 'kill -USR2 "$ranks"' USR2
# Slurm itself has sent it to the ranks: a cancelled, preempted or requeued job, whose next start is not ours to ask for.
# At the time limit it comes, too: there a run goes on, as after a signal that was heeded in time.
trap '[ "$(date +%s)" -ge "${SLURM_JOB_END_TIME:-9999999999}" ] || cancelled=(--cancelled)' TERM
# A trapped signal ends `wait`: only when the ranks have ended it gives their status.
while wait "$ranks"; status=$?; [ "$status" -gt 128 ] && kill -0 "$ranks" 2>/dev/null; do :; done
trap - USR1 USR2
say "ranks ended with status $status"
judge "$status" "${cancelled[@]}"
