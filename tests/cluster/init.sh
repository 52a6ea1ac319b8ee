#!/bin/bash
# PID 1 of a virtual host: its own name, disks, /tmp and shared memory, then its daemons.
# Arguments: the host's name, the testbed's folder.
set -u
host="$1" bed="$2"
hostname "$host"
mount --make-rprivate /
mount -t tmpfs -o size=2g,mode=1777 shm /dev/shm
mount -t tmpfs -o size=4g,mode=1777 tmp /tmp
mount -t tmpfs -o size=1g,mode=1777 nvme0 /nvme0
mount -t tmpfs -o size=1g,mode=1777 nvme1 /nvme1
mkdir -p "$bed/run/$host"

/usr/sbin/sshd -D -e -f "$bed/sshd_$host.conf" >>"$bed/sshd_$host.log" 2>&1 &
if [ -e "$bed/with-slurm" ]; then
  slurmd -D -N "$host" >>"$bed/slurmd_$host.out" 2>&1 &
fi
trap 'exit 0' TERM
sleep infinity &
while :; do wait -n; [ -d "/proc/$!" ] || exit 0; done
