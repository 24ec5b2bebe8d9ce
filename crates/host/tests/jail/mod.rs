mod attacks;
mod cgroup;
mod host;
mod matrix;
mod paths;
mod qemu;
mod seccomp;
mod spawning;
