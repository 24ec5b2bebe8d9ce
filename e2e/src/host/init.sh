#!/bin/bash
# What a distribution's init has done on a host before containerd is started; then the program; then the end.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t securityfs securityfs /sys/kernel/security
mount -t debugfs debugfs /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in kvm-amd overlay erofs loop; do modprobe "$module"; done
ip link set lo up
# A host has more than the loopback.
ip link add test0 type veth peer name test1
hostname test-host
/mnt/run </dev/null >/dev/ttyS1 2>&1
echo "the host is done: $?" >/dev/ttyS1
busybox poweroff -f
