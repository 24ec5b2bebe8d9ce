#!/bin/busybox sh
# The first program of a test host: drivers, the root disk, and the disk with what is to be run.
bb() { /bin/busybox "$@"; }
fail() { echo "initramfs: $*"; bb poweroff -f; }
bb mount -t proc proc /proc
bb mount -t sysfs sysfs /sys
bb mount -t devtmpfs dev /dev
# Kernels that have the drivers built in bring none.
for module in /modules/*.ko; do
  if [ -e "$module" ]; then bb insmod "$module" || fail "loading $module"; fi
done
tries=0
until [ -b /dev/vdb ] || [ $tries -gt 200 ]; do bb usleep 50000; tries=$((tries+1)); done
bb mount -t ext4 -o noatime /dev/vda /root || fail "no root disk"
bb mount -t ext4 -o noatime /dev/vdb /root/mnt || fail "no second disk"
bb umount /proc /sys /dev
exec /bin/busybox switch_root /root /mnt/init
