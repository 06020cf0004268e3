"""Runs one program that nobody has read, as a script in a process of its own that first confines itself.

`sandbox` starts it as `python -I confined.py`, in an empty folder, with an order as JSON on standard input and a
file as standard output, to which it reports a line of what confines it and a line of how the program ended.
It imports the standard library alone, since every program pays for its start.

On Linux the kernel enforces what is said here, for an ordinary user and in a container too:

    seccomp    a filter of system calls: no sockets, no new processes, no signals to others, no way out
    landlock   files: the folder can be written, Python's own and the system's libraries read, all else neither
    namespace  a network of its own without any interface, where an ordinary user may make one

Elsewhere Python's audit hooks refuse the same to all but code that sets out to get round them.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types
from contextlib import suppress
from typing import Any

# Of linux/prctl.h, seccomp.h, audit.h, sched.h, capability.h and landlock.h.
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
KILL, ALLOW, REFUSE = 0x80000000, 0x7FFF0000, 0x00050000  # what a filter returns; REFUSE | errno
EPERM, ENOSYS, SIGKILL = 1, 38, 9
CLONE_THREAD, CLONE_NEWUSER, CLONE_NEWNET = 0x10000, 0x10000000, 0x40000000
CAPABILITY_VERSION_3 = 0x20080522
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # on every machine

# The number of each system call on the machines that JAX has wheels for. Those from 424 on are the same everywhere.
CALLS = {
    "x86_64": {
        "socket": 41, "clone": 56, "fork": 57, "vfork": 58, "kill": 62, "ptrace": 101, "setpriority": 141,
        "rt_sigqueueinfo": 129, "tkill": 200, "tgkill": 234, "add_key": 248, "request_key": 249, "keyctl": 250,
        "unshare": 272, "perf_event_open": 298, "rt_tgsigqueueinfo": 297, "prlimit64": 302, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321, "shmget": 29, "msgget": 68, "semget": 64,
    },
    "aarch64": {
        "socket": 198, "clone": 220, "kill": 129, "ptrace": 117, "setpriority": 140,
        "rt_sigqueueinfo": 138, "tkill": 130, "tgkill": 131, "add_key": 217, "request_key": 218, "keyctl": 219,
        "unshare": 97, "perf_event_open": 241, "rt_tgsigqueueinfo": 240, "prlimit64": 261, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280, "shmget": 194, "msgget": 186, "semget": 190,
    },
}  # fmt: skip
EVERYWHERE = {"pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "pidfd_getfd": 438}
CLONE3 = 435
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*

# Landlock's rights, by the version of its interface that brought them.
READ_FILE, READ_DIR, EXECUTE, WRITE_FILE = 1 << 2, 1 << 3, 1 << 0, 1 << 1
RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
TCP = 0b11  # bind and connect, from version 4 on
READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

REFUSED = {  # Python's audit events -> what is not allowed
    "socket.__new__": "use the network", "socket.getaddrinfo": "use the network",
    "os.fork": "start processes", "os.forkpty": "start processes", "os.exec": "start processes",
    "os.posix_spawn": "start processes", "os.spawn": "start processes", "os.system": "start processes",
    "subprocess.Popen": "start processes", "pty.spawn": "start processes",
    "os.kill": "send signals", "os.killpg": "send signals", "signal.pthread_kill": "send signals",
}  # fmt: skip


def main() -> None:
    order = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    in_force = confine(order)
    os.write(report, f"{json.dumps(in_force)}\n".encode())
    end = run(order["program"], order["token"])
    os.write(report, f"{end}\n".encode(errors="backslashreplace"))
    os._exit(0)  # whatever threads it has left


def run(program: str, token: str) -> str:
    """`token` where the program runs to its end, or how it did not."""
    module = types.ModuleType("program")  # not "__main__": a main block of the model is no part of the answer
    sys.modules["program"] = module  # dataclasses look their own module up
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
    except BaseException as error:  # SystemExit too: the tests had not all passed
        return f"{type(error).__name__}: {' '.join(str(error).split())}".replace(token, "")
    return token


# Confinement


def confine(order: dict[str, Any]) -> list[str]:
    """Take from this process what a program does not need, and return the names of what is in force."""
    in_force = set_limits(order["limits"])
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        if os.getppid() != order["parent"]:  # it ended before that was said
            os._exit(1)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        layers = {"namespace": leave_network, "landlock": close_files, "seccomp": filter_calls}
        in_force += [name for name, enter in layers.items() if name in order["layers"] and enter(libc)]
        drop_capabilities(libc)
    sys.addaudithook(refuse)
    return in_force


def set_limits(limits: dict[str, int]) -> list[str]:
    """Resource limits by their names ("CPU", in seconds, or "AS", in bytes); returns those that the system takes."""
    found = []
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        with suppress(ValueError, OSError):
            if kind is not None:
                # The soft limit of CPU time comes first, and its signal tells it from other ends.
                resource.setrlimit(kind, (limit, limit + 1 if name == "CPU" else limit))
                found.append(name)
    return found


def refuse(event: str, _: object) -> None:
    """Return an audit hook."""
    if what := REFUSED.get(event):
        raise PermissionError(f"a model's code may not {what}")


def leave_network(libc: Any) -> bool:
    return libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0


def close_files(libc: Any) -> bool:
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = sum(rights for since, rights in RIGHTS.items() if since <= version)
    attributes = struct.pack("QQ", handled, TCP) if version >= 4 else struct.pack("Q", handled)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    allowed = [(path, READ_FILE | READ_DIR | EXECUTE) for path in (*READABLE, *sorted(python))]
    allowed += [(path, READ_FILE | WRITE_FILE) for path in DEVICES]
    allowed += [(os.getcwd(), handled & ~EXECUTE)]
    for path, rights in allowed:
        with suppress(OSError):
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights &= handled if os.path.isdir(path) else handled & (READ_FILE | WRITE_FILE | EXECUTE)
            rule = struct.pack("=Qi", rights, beneath)
            failed = libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
            os.close(beneath)
            if failed:
                return False
    return libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0


def filter_calls(libc: Any) -> bool:
    machine = platform.machine()
    if machine not in CALLS:
        return False
    program = b"".join(struct.pack("=HBBI", *line) for line in seccomp_filter(machine))
    buffer = ctypes.create_string_buffer(program, len(program))
    order = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, order, 0, 0) == 0


def seccomp_filter(machine: str) -> list[tuple[int, int, int, int]]:
    """Classic BPF over (number, architecture, pointer, arguments): lines of (code, jump if true, if false, value)."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    number, architecture, first_argument = 0, 4, 16
    calls = CALLS[machine] | EVERYWHERE
    clone, prlimit = calls.pop("clone"), calls.pop("prlimit64")
    lines = [
        (load, 0, 0, architecture),
        (equal, 1, 0, ARCHITECTURES[machine]),
        (give, 0, 0, KILL),  # 32-bit calls have other numbers
        (load, 0, 0, number),
    ]
    if machine == "x86_64":
        lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, REFUSE | ENOSYS)]  # so have those of x32
    for call in calls.values():
        lines += [(equal, 0, 1, call), (give, 0, 0, REFUSE | EPERM)]
    lines += [
        (equal, 0, 1, CLONE3), (give, 0, 0, REFUSE | ENOSYS),  # its flags are out of sight; libc falls back to clone
        (equal, 0, 4, clone), (load, 0, 0, first_argument), (any_bit, 1, 0, CLONE_THREAD),  # a thread, no process
        (give, 0, 0, REFUSE | EPERM), (give, 0, 0, ALLOW),
        (equal, 0, 4, prlimit), (load, 0, 0, first_argument), (equal, 1, 0, 0),  # of this process
        (give, 0, 0, REFUSE | EPERM), (give, 0, 0, ALLOW),
        (give, 0, 0, ALLOW),
    ]  # fmt: skip
    return lines


def drop_capabilities(libc: Any) -> None:
    """Return the user ids of root and of the one who has made a namespace."""
    libc.capset(struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))


if __name__ == "__main__":
    main()
