#!/bin/busybox sh
# The guest's first process: the host's root file system with an overlay in memory on top, then the command.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module args; do insmod "/modules/$module" $args; done </modules/order

for i in 0 1 2 3 4 5 6 7 8 9; do
    mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=524288 host /host && break
    sleep 0.1
done
mount -t tmpfs tmpfs /scratch -o mode=755,size=75%
mkdir /scratch/upper /scratch/work
mount -t overlay overlay /root -o lowerdir=/host,upperdir=/scratch/upper,workdir=/scratch/work

for fs in dev proc sys; do mount --move /$fs /root/$fs; done
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts devpts /root/dev/pts
mount -t tmpfs tmpfs /root/dev/shm
mount -t tmpfs tmpfs /root/run
mount -t securityfs securityfs /root/sys/kernel/security 2>/dev/null
mount -t debugfs debugfs /root/sys/kernel/debug 2>/dev/null
mount -t tracefs tracefs /root/sys/kernel/tracing 2>/dev/null
mkdir -p /root/run/kernel-lab
share() {
    mkdir -p "/root$2"
    mount -t 9p -o trans=virtio,version=9p2000.L,cache=none,msize=524288 "$1" "/root$2"
}
share control /run/kernel-lab
. /root/run/kernel-lab/setup

ln -s /proc/self/fd /root/dev/fd
ln -s fd/0 /root/dev/stdin
ln -s fd/1 /root/dev/stdout
ln -s fd/2 /root/dev/stderr
ip link set lo up
ulimit -c 0
: >/root/run/kernel-lab/started
if [ -n "$lab_console" ]; then
    setsid -c chroot /root /bin/sh /run/kernel-lab/command </root/dev/ttyS0 >/root/dev/ttyS0 2>&1
else
    for port in /root/dev/vport*p1; do out=$port; done
    for port in /root/dev/vport*p2; do err=$port; done
    chroot /root /bin/sh /run/kernel-lab/command </root/dev/null >"$out" 2>"$err"
fi
echo $? >/root/run/kernel-lab/status
poweroff -f
