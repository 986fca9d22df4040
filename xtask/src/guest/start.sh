# The guest's second stage, on this machine's files: devices, then the command.
box=/bin/busybox
$box mkdir -p /dev/pts /dev/shm /dev/net
$box mount -t devpts none /dev/pts
$box mount -t tmpfs none /dev/shm
[ -e /dev/net/tun ] || $box mknod /dev/net/tun c 10 200
$box ln -sf /proc/self/fd /dev/fd
$box ln -sf /proc/self/fd/0 /dev/stdin
$box ln -sf /proc/self/fd/1 /dev/stdout
$box ln -sf /proc/self/fd/2 /dev/stderr
$box mount -t cgroup2 none /sys/fs/cgroup
$box mount -t bpf none /sys/fs/bpf
echo guest >/proc/sys/kernel/hostname
$box ip link set lo up
: >/run/guest/started
# A port can be opened once only; any number of processes may open a pipe.
for stream in stdout stderr; do
    $box mkfifo "/run/$stream"
    for port in /sys/class/virtio-ports/*; do
        if [ "$($box cat "$port/name")" = "$stream" ]; then
            $box cat "/run/$stream" >"/dev/${port##*/}" &
            readers="$readers $!"
        fi
    done
done
# Tests that change the machine itself run where this is set, and nowhere else.
PORTOLAN_GUEST=1 $box sh /run/guest/command </dev/null >/run/stdout 2>/run/stderr
echo $? >/run/guest/status
# What the command left running may hold the pipes open: the rest is awaited for two seconds.
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    # shellcheck disable=SC2086
    kill -0 $readers 2>/dev/null || break
    $box sleep 0.1
done
echo b >/proc/sysrq-trigger
$box sleep 60
