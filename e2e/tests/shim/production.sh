#!/bin/bash
# Runs the cases on the host: two at a time, each bounded. Writes "case NAME: ok in N s" for each, or FAILED and why.
cd / || exit 2
export BAILEY_BIN_DIR=/mnt/bin XDG_CACHE_HOME=/mnt/cache CARGO_TERM_COLOR=never
# A boot that hangs is given up in time for another one.
export BAILEY_E2E_BOOT_SECONDS=55
export BAILEY_E2E_MUST_HAVE=kvm,cgroup2,apparmor BAILEY_APPARMOR_PROFILES=/mnt/apparmor
uname -r
standin=$(cat /mnt/standin-path)
mkdir -p "${standin%/*}" && ln -s /mnt/bin/bailey-jail-standin "$standin"
apparmor_parser --replace /mnt/apparmor/bailey-vmm || exit 2
# A VM that never runs. With none, KVM changes the kernel's code at the start and at the end of each VM, and emulators
# of several processors now and then run code while it is half changed: the host dies of it.
qemu-system-x86_64 -S -M microvm,accel=kvm -m 32 -nodefaults -no-user-config -display none &
sleep 1

# one NAME[@LABEL] PROGRAM VARIABLES...
one() {
  local name=$1 program=$2 begun=$SECONDS word=FAILED output
  shift 2
  output=$(env "$@" timeout --kill-after=10 240 "/mnt/bin/$program" --exact "${name%@*}" --nocapture 2>&1)
  # A test that is not there would be no failure.
  if grep -q '^test result: ok. 1 passed' <<<"$output"; then word=ok; fi
  (
    flock 9
    echo "case $name: $word in $((SECONDS - begun)) s"
    if [ "$word" != ok ]; then sed "s|^|  |" <<<"$output"; fi
  ) 9>/run/one-at-a-time
  [ "$word" = ok ]
}
export -f one
xargs --max-procs=2 --max-lines=1 bash -c 'one "$@"' one </mnt/cases
failed=$?
# What the kernel has killed or refused says why a case failed.
if [ $failed -ne 0 ]; then dmesg | grep -E 'audit|segfault|Out of memory' | grep -v 'comm="standin"' | tail -n 40; fi
kill %1
exit $failed
