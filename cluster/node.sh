#!/usr/bin/env bash
# What makes a machine a node of the cluster, the same everywhere: the YAML files beside this say when to call it.
#
#     node.sh setup             install from the lock, hash by hash; login shells then find the environment
#     node.sh ray start ...     start Ray, with the token and nothing shown to the world; options of `ray start`
#
# BNSCALE_VENV names an environment that is there already (an image, a machine of yours): nothing is installed then.
# What fails says on which machine and with which last lines, and ends with its exit status.
set -euo pipefail
shopt -s inherit_errexit

readonly repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly venv=${BNSCALE_VENV:-$repository/.venv}
readonly token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

# Run a command quietly. Where it fails, its last lines are what a reader needs, and all that Ray's log has room for.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    if ((status)); then
        echo "node.sh: $(hostname): \`$*\` failed with exit status $status; its last lines:" >&2
        tail -n 20 "$log" | sed 's/^/    /' >&2
    fi
    rm -f "$log"
    return "$status"
}

refuse() {
    echo "node.sh: $(hostname): $*" >&2
    exit 2
}

setup() {
    if [[ ! -v BNSCALE_VENV ]]; then
        if ! command -v make >/dev/null || ! python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            quietly sudo -n apt-get update -qq
            quietly sudo -n env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y make python3-venv
        fi
        quietly make -C "$repository" setup LOCK=cluster/requirements.lock
    fi
    [[ -x $venv/bin/ray ]] || refuse "no ray in $venv; install cluster/requirements.lock there, or unset BNSCALE_VENV"
    # Sourced by every shell that Ray opens, before anything in ~/.bashrc can return from it.
    cat >~/.bnscale.sh <<-END
	export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
	# \`ray job stop\` kills after 3 s by default; what runs has so many to save its checkpoints.
	export RAY_JOB_STOP_WAIT_TIME_S=300
	export PATH="$venv/bin:\$PATH" PYTHONPATH="$repository"
	END
    touch ~/.bashrc
    grep -qxF '. ~/.bnscale.sh' ~/.bashrc || sed -i '1i . ~/.bnscale.sh' ~/.bashrc
    grep -qxF '. ~/.bnscale.sh' ~/.bashrc || echo '. ~/.bnscale.sh' >~/.bashrc # sed has no line 1 in an empty file
}

start() {
    . ~/.bnscale.sh
    [[ -v RAY_AUTH_TOKEN || -s $token ]] ||
        refuse "no token in $token; on the machine that starts the cluster: ray get-auth-token --generate"
    [[ -v RAY_AUTH_TOKEN ]] || { chmod 700 "$(dirname "$token")" && chmod 600 "$token"; }
    ulimit -n "$(ulimit -H -n)"
    local options=(--object-manager-port=8076 --disable-usage-stats)
    # A machine may have several addresses; the one by which it was reached is the one that the others know.
    if [[ ${SSH_CONNECTION:-} =~ ^[^\ ]+\ [0-9]+\ ([0-9.]+)\ [0-9]+$ ]]; then
        options+=(--node-ip-address="${BASH_REMATCH[1]}")
    fi
    if [[ " $* " == *" --head "* ]]; then
        options+=(--port=6379 --dashboard-host=127.0.0.1)
        # Ray's second autoscaler, `ray up`'s default, starts no worker of provider `local`, and turns to no other
        # kind of machine where a cloud refuses the first. The older one does, by a score of ours.
        export RAY_enable_autoscaler_v2=0 RAY_AUTOSCALER_UTILIZATION_SCORER=bnscale.schedule.fallback.score
    fi
    # One start or stop at a time: what is begun here must not be ended by who cleans up after the one before.
    exec 9>~/.bnscale.lock
    flock 9
    ! { runs raylet || runs gcs_server; } || quietly ray stop 9>&-
    ray start "${options[@]}" "$@" 9>&-
    # Where the head is gone (`ray down` of provider `local` ends nothing else), a raylet leaves within a minute, its agents
    # a minute later, and Ray's log monitor never.
    setsid bash "$repository/cluster/node.sh" clean 9>&- </dev/null >/dev/null 2>&1 &
}

# Wait for the end of this node's raylet, and end what it leaves.
clean() {
    . ~/.bnscale.sh
    local raylet
    raylet=$(pgrep -n -u "$(id -u)" -x raylet) || return 0
    tail --pid="$raylet" -f /dev/null
    exec 9>~/.bnscale.lock
    flock 9
    runs raylet || ray stop 9>&-
}

runs() { pgrep -u "$(id -u)" -x "$1" >/dev/null; }

case "$*" in
setup) setup ;;
clean) clean ;;
"ray start "*) start "${@:3}" ;;
*) refuse "say \`setup\` or \`ray start ...\`, not \`$*\`" ;;
esac
