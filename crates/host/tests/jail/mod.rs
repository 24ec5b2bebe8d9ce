mod apparmor;
mod attacks;
mod host;
mod matrix;
mod paths;
mod qemu;
mod seccomp;
mod spawning;
