#!/usr/bin/env bash
# Process 1 of an imitated container, until it becomes sshd. Runs in fresh mount, pid, uts and ipc namespaces, inside
# the container's network namespace.   container_init.sh STATE_FOLDER NAME SHARED_PATH...
set -euo pipefail
state=$1 name=$2
shift 2
root=$state/rootfs
hostname "$name"
mount --make-rprivate /
mount -t tmpfs -o size=64m,mode=755 tmpfs "$root"

read_only() { # bind a path of the host at the same place, read-only
  mkdir -p "$root$1"
  mount --bind "$1" "$root$1"
  mount -o remount,bind,ro "$root$1"
}
for path in /bin /sbin /lib /lib32 /lib64 /libx32; do
  if [ -L "$path" ]; then cp -P "$path" "$root$path"; elif [ -d "$path" ]; then read_only "$path"; fi
done
read_only /usr
read_only /etc
mkdir -p "$root"/{proc,sys,dev,tmp,run/sshd,run/lab,root,var/tmp,var/log,var/empty,mnt,old}
ln -s /run "$root/var/run"
touch "$root/var/log/lastlog" "$root/var/log/wtmp" "$root/run/utmp"
chmod 1777 "$root/tmp" "$root/var/tmp"
mount --bind "$state/root" "$root/root"
mount --bind "$state/tmp" "$root/tmp"
mount --bind "$state/hosts" "$root/etc/hosts"
for path in "$@"; do read_only "$path"; done
cp "$state"/{sshd_config,host_key,environment,onstart.sh} "$root/run/lab/"
cat > "$root/run/lab/boot.sh" << 'BOOT'
. /run/lab/environment
(sleep 1; bash /run/lab/onstart.sh > /tmp/onstart.log 2>&1 < /dev/null) &  # as on Vast.ai, where sshd is first
exec /usr/sbin/sshd -D -e -f /run/lab/sshd_config
BOOT
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o size=2g,mode=1777 shm "$root/dev/shm"
cd "$root"
pivot_root . old
# The capabilities of a container that Docker starts without options: no NET_ADMIN, no SYS_ADMIN, no SYS_PTRACE.
exec chroot . /bin/bash -c 'umount -l /old && rmdir /old && cd /root && exec setpriv --inh-caps=-all \
  --bounding-set=-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,+net_raw,+sys_chroot,+mknod,+audit_write,+setfcap \
  env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin bash /run/lab/boot.sh'
