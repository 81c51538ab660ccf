#!/bin/bash
# What every launcher does in its job: bash slurm/body.sh VERB WORDS...
#
# Checks on the batch host what can be checked, starts the ranks, waits, and starts the job again under its own id where
# `swiftv2 job` says that this helps. docs/slurm.md explains; what a centre differs in stands in slurm/sites/.
# Without `nounset`: before bash 4.4 it takes an empty array for an error.
set -o pipefail

say() { echo "swiftv2: $(date '+%F %T') $*" >&2; }
fail() {
    say "$1"
    exit "${2:-1}"
}

# A field of what `scontrol show job --oneliner` says; nothing where it is null.
field() { sed -n "s/.* $2=\([^ ]*\).*/\1/p" <<<" $1" | sed 's/^(null)$//'; }

# A controller that restarts, or is busy, answers some minutes later.
patiently() {
    local try
    for try in {1..27}; do
        timeout 60 "$@" && return
        say "$1 ${2:-} did not work (try $try of 27)"
        sleep 20
    done
    return 1
}

know_job() {
    [ -n "${SLURM_JOB_ID:-}" ] || fail "slurm/body.sh is the body of a job: give \`sbatch slurm/pretrain_806M.sh ...\`" 2
    # Variables of a job in which this one was submitted are handed on by sbatch: only the number is sure to be its own. That
    # of an array's last element is the whole array's, too.
    record=$(patiently scontrol show job --oneliner "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID ")
    [ -n "$record" ] || fail "Slurm does not tell of job $SLURM_JOB_ID"
    unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_JOB_END_TIME MASTER_ADDR MASTER_PORT
    job=$SLURM_JOB_ID
    if [ -n "$(field "$record" ArrayTaskId)" ]; then
        SLURM_ARRAY_JOB_ID=$(field "$record" ArrayJobId)
        SLURM_ARRAY_TASK_ID=$(field "$record" ArrayTaskId)
        export SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    restart=$(field "$record" Restarts)
    export SLURM_RESTART_COUNT=$restart
    local end
    end=$(date -d "$(field "$record" EndTime)" +%s 2>/dev/null)
    if [ -n "$end" ]; then
        export SLURM_JOB_END_TIME=$end
    else
        say "the end of job $job is not known: ranks stop by Slurm's signal alone"
    fi
}

read_site() {
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    export SWIFTV2_ROOT=$root
    site=${SWIFTV2_SITE:-}
    [ -n "$site" ] || { [ "${NERSC_HOST:-}" = perlmutter ] && site=perlmutter; } || site=local
    [ -f "$site" ] || site=$root/slurm/sites/$site.env
    [ -f "$site" ] || fail "SWIFTV2_SITE=${SWIFTV2_SITE:-}: no $site; sites are $(cd "$root/slurm/sites" && echo *.env)" 2
    # shellcheck source=/dev/null
    . "$site" || fail "$site could not be read to its end" 2
}

# How Python is started (`inside`, `python`), and tasks (`step`).
know_environment() {
    local module names options
    for module in ${SWIFTV2_MODULES:-}; do
        module load "$module" || fail "module load $module failed: \`module avail\` lists what there is; $site names it"
    done
    [ ! -d "$root/swiftv2" ] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    python=${SWIFTV2_PYTHON:-python3}
    case ${SWIFTV2_RUNTIME:-python} in
    python)
        inside=()
        command -v "$python" >/dev/null ||
            fail "SWIFTV2_PYTHON=$python is not there: name the interpreter that swiftv2's packages are installed for"
        ;;
    shifter) inside=(shifter "--image=${SWIFTV2_IMAGE:?name the image: export SWIFTV2_IMAGE=...}" "--module=gpu,nccl-plugin") ;;
    podman-hpc)
        inside=(podman-hpc run --rm --gpu --nccl --net=host --ipc=host --pid=host --workdir "$PWD")
        inside+=(--volume "$PWD:$PWD" --volume "$root:$root")
        [ -z "${SCRATCH:-}" ] || inside+=(--volume "$SCRATCH:$SCRATCH")
        for names in 'SLURM*' 'SWIFTV2_*' 'NCCL_*' 'FI_*' 'TORCH_*' 'PYTORCH_*' 'OMP_*' 'GLOO_*' 'MASTER_*' PYTHONPATH; do
            inside+=(--env "$names")
        done
        inside+=("${SWIFTV2_IMAGE:?name the image: export SWIFTV2_IMAGE=...}")
        ;;
    *) fail "SWIFTV2_RUNTIME=$SWIFTV2_RUNTIME: take python, shifter or podman-hpc ($site)" 2 ;;
    esac

    # In Slurm 22 and later srun takes no --cpus-per-task from the job.
    step=(srun --export=ALL "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=600)
    read -r -a options <<<"${SWIFTV2_SRUN:-}"
    step+=("${options[@]}")
    # Training needs no MPI, and must not find any.
    if [ "$verb" = store ]; then step+=("--mpi=${SWIFTV2_MPI:-pmi2}"); else step+=(--mpi=none); fi

    if [ -n "${SWIFTV2_PACKAGES:-}" ]; then
        [ -f "$SWIFTV2_PACKAGES" ] || fail "SWIFTV2_PACKAGES=$SWIFTV2_PACKAGES is not there: make it (docs/perlmutter.md), or unset it"
        "${step[@]}" "--ntasks=$SLURM_NNODES" --ntasks-per-node=1 bash "$root/slurm/stage.sh" ||
            fail "$SWIFTV2_PACKAGES could not be unpacked on every node"
        export PYTHONPATH=${SWIFTV2_NODE_LOCAL:-/tmp}/swiftv2-$SLURM_JOB_ID/$SLURMD_NODENAME/packages${PYTHONPATH:+:$PYTHONPATH}
    fi
    local lacks
    lacks=$("${inside[@]}" "$python" -c '
import importlib.util
lacking = [name for name in ("torch", "deepspeed", "zarr", "pydantic", "yaml", "swiftv2") if importlib.util.find_spec(name) is None]
print("lacking:", *lacking or ["nothing"])' | sed -n 's/^lacking: //p')
    [ "$lacks" = nothing ] || fail "$python lacks packages of swiftv2 ($lacks): install them there, or name another as SWIFTV2_PYTHON"
    if [ -n "${SWIFTV2_NCCL_PLUGIN:-}" ]; then
        "${inside[@]}" "$python" -c "import ctypes; ctypes.CDLL('$SWIFTV2_NCCL_PLUGIN')" 2>/dev/null ||
            fail "$SWIFTV2_NCCL_PLUGIN cannot be loaded, and NCCL would fall back to TCP: load its module, or mend $site"
    fi
}

swiftv2() { "${inside[@]}" "$python" -m swiftv2 "$@"; }

# Where nodes have names that only Slurm knows, their ranks meet at the address that it has for the first of them.
find_meeting() {
    local first
    first=$(patiently scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if [ -n "${SWIFTV2_MASTER_ADDR:-}" ]; then
        export MASTER_ADDR=$SWIFTV2_MASTER_ADDR
    elif ! getent hosts "$first" >/dev/null; then
        MASTER_ADDR=$(field "$(patiently scontrol show node --oneliner "$first")" NodeAddr)
        [ -n "$MASTER_ADDR" ] || fail "the first node, $first, has no address that this one knows: export SWIFTV2_MASTER_ADDR"
        export MASTER_ADDR
    fi
}

# What starts this once more, when the job itself is gone: the run directory's resume.sh.
note_submission() { # with the words that `sbatch` was given
    local script name value options=()
    script=$(timeout 60 scontrol show job "$job" | sed -n 's/^ *Command=//p')
    [ "$script" = "${script%%.sh *}" ] || script=${script%%.sh *}.sh
    # Who pays and which queue come from the site file and the shell: records may hold names that a centre made of those.
    for name in constraint:Features time:TimeLimit job-name:JobName gpus-per-node:TresPerNode; do
        value=$(field "$record" "${name#*:}")
        value=${value#gres[:/]gpu:}
        [ -z "$value" ] || options+=("--${name%:*}=$value")
    done
    options+=("--nodes=$SLURM_NNODES" "--ntasks-per-node=${SLURM_NTASKS_PER_NODE:-1}" "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || options+=("--array=$SLURM_ARRAY_TASK_ID")
    SWIFTV2_SUBMITTED=$(printf '%q ' sbatch "${options[@]}" "$script" "$@")
    export SWIFTV2_SUBMITTED SWIFTV2_SITE_FILE=$site
}

requeue() { # with the hosts to leave out, or nothing
    # Slurm ends this script while it requeues the job; the second command must still be given. What is ignored here is
    # ignored by scontrol, too, but not by `timeout`, which would end it: these two have their own patience.
    trap '' TERM
    local try
    for try in {1..27}; do
        stay # An answer may be lost of a requeue that was done.
        scontrol requeue "$job" && break
        [ "$try" -lt 27 ] || fail "job $job cannot be requeued: the run's resume.sh queues it again"
        sleep 20
    done
    if [ -n "$1" ]; then
        local before
        before=$(field "$record" ExcNodeList)
        scontrol update "JobId=$job" "ExcNodeList=${before:+$before,}$1" || say "$1 was not left out: doctor looks again"
    fi
    sleep 300
    exit 75
}

# A node that Slurm has lost sight of lives on, and this script on it: the job may be running elsewhere by now.
stay() {
    local now
    now=$(patiently scontrol show job --oneliner "$job") || fail "Slurm does not tell of job $job: the run's resume.sh queues it again"
    if [ "$(field "$now" Restarts)" != "$restart" ] || [ "$(field "$now" BatchHost)" != "$SLURMD_NODENAME" ]; then
        fail "job $job has been given another start: nothing more is done here"
    fi
    # Behind its time limit a job goes on; cancelled, preempted or requeued, its next start is not ours to ask for.
    case $(field "$now" JobState):$(field "$now" Reason) in
    RUNNING:* | TIMEOUT:TimeLimit | COMPLETING:TimeLimit) ;;
    *) fail "job $job was told to end, so it is not requeued; given again, the run goes on" ;;
    esac
}

judge() { # with the status, and further words for `job end`
    local hosts verdict status=$1
    shift
    stay
    hosts=$(swiftv2 job end "$verb" "$target" --status "$status" --mark "$mark" --most "$most" "$@")
    verdict=$?
    [ "$verdict" -ne 75 ] || requeue "$hosts"
    # Packages and caches; where the job goes on, nodes that it comes back to have them still.
    timeout 60 "${step[@]}" "--ntasks=$SLURM_NNODES" --ntasks-per-node=1 rm -rf "${SWIFTV2_NODE_LOCAL:-/tmp}/swiftv2-$SLURM_JOB_ID" \
        2>/dev/null
    exit "$verdict"
}

see_doctor() {
    local report=$target/logs/doctor-$job-$restart.json depth=() status
    [ "$1" = full ] || depth=(--quick)
    "${step[@]}" --time=30 "${inside[@]}" bash "$root/slurm/rank.sh" "$python" -m swiftv2 doctor "${depth[@]}" --json "${command[@]:1}" >"$report"
    status=$?
    [ "$status" -eq 0 ] || judge "$status" --doctor "$report"
}

train() {
    "${step[@]}" "${inside[@]}" bash "$root/slurm/rank.sh" "$python" -m swiftv2 "${command[@]}" &
    local ranks=$! status
    trap 'kill -USR1 "$ranks"' USR1
    trap 'kill -USR2 "$ranks"' USR2
    # Slurm sends it to the ranks as well; what it means, the job's record tells when they have ended.
    trap : TERM
    # A trapped signal ends `wait`: only when the ranks have ended it gives their status.
    while wait "$ranks"; status=$?; [ "$status" -gt 128 ] && kill -0 "$ranks" 2>/dev/null; do :; done
    trap : USR1 USR2
    # They may have ended between the two.
    local again
    wait "$ranks"
    again=$?
    [ "$again" -eq 127 ] || status=$again
    say "ranks ended with status $status"
    judge "$status"
}

main() {
    verb=$1
    # For the ranks, should they come before or after these: the script goes on.
    trap : USR1 USR2
    know_job
    read_site
    know_environment
    find_meeting
    local words=("$@") given=("${@:3}") usual # what `sbatch` was given stands behind the launcher's own two words, or one
    case $verb in
    pretrain)
        # What the site sets for all runs comes before what was given, so that this has the last word.
        read -r -a usual <<<"${SWIFTV2_WORDS:-}"
        words=("$1" "$2" "${usual[@]}" "${given[@]}")
        ;;
    sweep | finetune | tune | embed) given=("${@:2}") ;;
    esac
    most=${SWIFTV2_MOST_REQUEUES:-30}
    local answer lines
    answer=$(swiftv2 job begin --most "$most" "${words[@]}") || exit $?
    mapfile -t lines <<<"$answer"
    target=${lines[0]} mark=${lines[1]} command=("${lines[@]:2}")
    case $mark in *[!0-9]* | '') fail "\`swiftv2 job begin\` said what it should not: ${lines[0]}" ;; esac
    note_submission "${given[@]}"
    say "job $job, start $((restart + 1)), $SLURM_NNODES nodes ($SLURM_JOB_NODELIST), site $site: $target from $mark"
    local doctor=${SWIFTV2_DOCTOR:-quick}
    case $verb in
    store | tune | embed | finetune) doctor=off ;; # It checks what a pretraining run is made from.
    esac
    if [ "$SLURM_NNODES" -gt 1 ] && [ "$doctor" != off ]; then see_doctor "$doctor"; fi
    # A worker of a study starts the ranks of its trials itself.
    [ "$verb" != tune ] || step+=("--ntasks=$SLURM_NNODES" --ntasks-per-node=1)
    train
}

# Read to its end before anything is done: a checkout may change while its jobs run.
{ main "$@"; }
