#!/usr/bin/env bash
# A Slurm cluster of one node with accounting, for the tests: Debian or Ubuntu, root, no systemd.
#
#   tests/slurm/cluster.sh install | start | stop
#
# `start` leaves two partitions of the same two cores: `main`, and `low`, whose jobs those of `main`
# preempt: they are told (SIGTERM, and submitit's SIGUSR2), have 30 s, and are queued again. `stop` ends every daemon that `start` began. An
# existing /etc/slurm/slurm.conf that is not this script's is left alone, and nothing is started.
set -euo pipefail

MARK="# written by tests/slurm/cluster.sh"
NODE=$(hostname -s)
DATA=/var/lib/lora-slurm-mariadb
SOCKET=$DATA/socket
PORT=33061

install() {
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
        slurm-wlm munge slurmdbd mariadb-server
}

write() { # FILE MODE, content on stdin
    { echo "$MARK"; cat; } > "$1"
    chown slurm "$1"
    chmod "$2" "$1"
}

configure() {
    if [ -f /etc/slurm/slurm.conf ] && ! grep -qF "$MARK" /etc/slurm/slurm.conf; then
        echo "/etc/slurm/slurm.conf is another cluster's: nothing was started" >&2
        exit 1
    fi
    # linuxproc and task/none need no cgroups. cred_expire: what a requeued job waits at least.
    write /etc/slurm/slurm.conf 644 <<END
ClusterName=lora
SlurmctldHost=$NODE(127.0.0.1)
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmUser=slurm
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=30
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=preempt_send_user_signal
PartitionName=main Nodes=$NODE Default=YES State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=$NODE State=UP PriorityTier=1 GraceTime=30
END
    write /etc/slurm/slurmdbd.conf 600 <<END
AuthType=auth/munge
DbdHost=localhost
SlurmUser=slurm
PidFile=/run/slurm/slurmdbd.pid
LogFile=/var/log/slurm/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$PORT
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
END
    command install -d -o slurm /var/spool/slurmctld /var/log/slurm /run/slurm
    command install -d /var/spool/slurmd
    command install -d -o munge -m 0755 /run/munge
}

within() { # SECONDS COMMAND...: again until it succeeds
    local end=$((SECONDS + $1))
    shift
    until "$@" > /dev/null 2>&1; do
        if [ $SECONDS -gt $end ]; then
            echo "in vain: $*" >&2
            exit 1
        fi
        sleep 0.5
    done
}

sql() { mariadb --socket="$SOCKET" "$@"; }

start() {
    configure
    pgrep -x munged > /dev/null || runuser -u munge -- munged
    if [ ! -d "$DATA/mysql" ]; then
        command install -d -o mysql "$DATA"
        mariadb-install-db --user=mysql --datadir="$DATA" > /dev/null
    fi
    mariadbd --no-defaults --user=mysql --datadir="$DATA" --socket="$SOCKET" \
        --pid-file="$DATA/lora.pid" --bind-address=127.0.0.1 --port=$PORT > "$DATA/log" 2>&1 &
    within 30 sql -e "select 1"
    sql -e "create database if not exists slurm_acct_db;
            create user if not exists slurm@localhost identified by 'slurm';
            create user if not exists slurm@127.0.0.1 identified by 'slurm';
            grant all on slurm_acct_db.* to slurm@localhost;
            grant all on slurm_acct_db.* to slurm@127.0.0.1;"
    slurmdbd
    within 30 sacctmgr -n list cluster
    sacctmgr -n list cluster | grep -qw lora || sacctmgr -i add cluster lora > /dev/null
    slurmctld -c # forgets: a node drained after a kill would stay so
    within 30 scontrol ping
    slurmd
    within 60 timeout 10 srun -n1 true
    sinfo
}

stop() {
    scancel --user=root 2> /dev/null || true
    for name in slurmd slurmctld slurmdbd; do
        pkill -x "$name" || true
    done
    if [ -f "$DATA/lora.pid" ]; then
        kill "$(cat "$DATA/lora.pid")" || true
    fi
    sleep 2
    rm -f /run/slurmctld.pid /run/slurmd.pid /run/slurm/slurmdbd.pid
}

case "${1:-}" in
    install | start | stop) "$1" ;;
    *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
