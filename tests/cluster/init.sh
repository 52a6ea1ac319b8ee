#!/bin/bash
# PID 1 of a virtual host: its own name, disks, /tmp and shared memory, then its daemons.
# Arguments: the host's name, the testbed's folder.
set -u
host="$1" bed="$2"
ulimit -n "$(ulimit -Hn)"
hostname "$host"
mount --make-rprivate /
mount -t tmpfs -o size=2g,mode=1777 shm /dev/shm
mount -t tmpfs -o size=4g,mode=1777 tmp /tmp
mount -t tmpfs -o size=1g,mode=1777 nvme0 /nvme0
mount -t tmpfs -o size=1g,mode=1777 nvme1 /nvme1
# No name server is there, and that is known at once; one that does not answer costs 10 s a name.
mount --bind "$bed/resolv.conf" /etc/resolv.conf
mkdir -p "$bed/run/$host"
# A login shell of pyenv's takes a lock beside its shims, and a host that loses power would leave it
# to all the others, for a minute each time.
shims=/root/.pyenv/shims
if [ -d "$shims" ]; then
  mkdir /tmp/.shims
  cp -a "$shims/." /tmp/.shims
  rm -f /tmp/.shims/.pyenv-shim
  mount --bind /tmp/.shims "$shims"
fi
# The host's own hardware (tests/cluster/hardware.py) where the real one would be.
sim="$bed/sim/$host"
mount --bind "$sim/nvml" /run/nvml-stand-in
mount --bind "$bed/ld.so.cache" /etc/ld.so.cache
mount --bind "$sim/pci" /sys/bus/pci/devices
mount -t overlay overlay -o "lowerdir=$bed/sim/class:/sys/class" /sys/class
mount --bind "$sim/infiniband" /sys/class/infiniband
mount --bind "$sim/nvme" /sys/class/nvme
mount -t overlay overlay -o "lowerdir=$sim/module:/sys/module" /sys/module
mount --bind "$sim/kmsg" /dev/kmsg
mount --bind "$sim/preload" /etc/ld.so.preload

/usr/sbin/sshd -D -e -f "$bed/sshd_$host.conf" >>"$bed/sshd_$host.log" 2>&1 &
if [ -e "$bed/with-slurm" ]; then
  slurmd -D -N "$host" >>"$bed/slurmd_$host.out" 2>&1 &
fi
trap 'exit 0' TERM
sleep infinity &
while :; do wait -n; [ -d "/proc/$!" ] || exit 0; done
