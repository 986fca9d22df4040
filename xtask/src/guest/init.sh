#!/bin/sh
# The guest's first process: lays memory over this machine's files and goes on there.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
while read -r module; do insmod "/modules/$module.ko"; done </modules/list
transport=trans=virtio,version=9p2000.L,msize=512000
mount -t tmpfs none /memory
mkdir /memory/upper /memory/work /memory/control
mount -t 9p -o "$transport,ro,cache=loose" root /host
mount -t 9p -o "$transport,rw,cache=none" control /memory/control
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work none /root
for tree in proc sys dev; do mount --move "/$tree" "/root/$tree"; done
mount -t tmpfs none /root/run
mkdir -p /root/run/guest /root/run/lock /root/run/netns /root/lib/modules
mount --bind /memory/control /root/run/guest
mount --bind "/host$(cat /memory/control/modules)" /root/lib/modules
exec switch_root /root /bin/busybox sh /run/guest/start
