"""Hosts of a lab as network namespaces, in a namespace of processes that leaves nothing behind.

Three generations of processes. The *outer* process waits. Its child is the first process of a new pid namespace, the
*init*: when it ends, the kernel kills every process in the lab, and with the last one go the network namespaces, their
devices and the mounts, which nothing outside has a name for. The kernel also kills init when the outer process dies, so
even ``kill -9`` leaves no process. Init's children are the router and the commands.

In the lab ``/etc/hosts`` has the hosts' names, and ``ip netns exec HOST`` works where the user is root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import kernel
from lab.router import CONTROL, Port, Router
from lab.settings import HostSettings, LabError

FOLDER_VARIABLE = "NETWORK_LAB"
"""Where processes in a lab find its folder."""
OUTSIDE = "outside"
"""Said instead of a host: the network that the lab was started from."""
_NETMASK = "255.255.255.0"
_NAMESPACES = "netns"
_IP_COMMAND_FOLDER = Path("/run/netns")
_HOSTS_FILE = Path("/etc/hosts")
_STOP_TIMEOUT_S = 60.0
"""For commands to end by themselves when the lab is to; a second request doesn't wait for them."""
_NOT_RUN = 127
"""A shell's exit code for a command that can't be run."""
_AWAITED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command and where it runs."""

    host: str
    command: Sequence[str] | Callable[[], int]
    """A program and its arguments, or a function that returns an exit code."""


def address_of(number: int) -> str:
    """The address of a lab's host, by its place among the hosts."""
    return f"10.77.0.{number + 1}"


def run(
    hosts: Mapping[str, HostSettings],
    main: Job,
    background: Sequence[Job] = (),
    *,
    seed: int = 0,
    congestion_control: str | None = None,
) -> int:
    """Run commands in a new lab until ``main`` has ended; return its exit code as a shell would.

    Ctrl-C is for the commands; when it comes a second time, the lab ends at once.

    Raises:
        LabError: the system doesn't allow a lab, or a command's host isn't one.
    """
    for job in (main, *background):
        if job.host not in (*hosts, OUTSIDE):
            raise LabError(f"there is no host {job.host}: there are {', '.join(hosts)}")
    if not sys.platform.startswith("linux"):
        raise LabError("the lab needs Linux; without it, and without root, use --forward")
    folder = Path(tempfile.mkdtemp(prefix="network-lab-"))
    try:
        return _run_outer(lambda: _Init(folder, hosts, seed, congestion_control).run(main, background))
    finally:
        shutil.rmtree(folder)


def obstacle() -> str | None:
    """Why this system and user can't have a lab; ``None`` if they can."""
    command = [sys.executable, str(Path(__file__).parent.parent / "network_lab.py"), "--hosts", "a", "--", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else tried.stderr.strip() or f"exit code {tried.returncode}"


def current_folder() -> Path:
    """The folder of the lab that this process is in.

    Raises:
        LabError: it is in none.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise LabError("this works only for commands in a lab: start one with --hosts")
    return Path(folder)


def enter_host(folder: Path, host: str) -> None:
    """Make this process belong to a host of the lab that it is in.

    Raises:
        LabError: there is no such host.
    """
    if not (folder / _NAMESPACES / host).exists():
        raise LabError(f"there is no host {host} in this lab")
    kernel.enter_network(folder / _NAMESPACES / host)


# --- outer ------------------------------------------------------------------------------------------------------------


def _run_outer(init: Callable[[], int]) -> int:
    alive, alive_writer = os.pipe()
    try:
        _unshare()
        pid = os.fork()
    except OSError as error:
        raise LabError(f"the system allows no namespaces here ({error.strerror}): run as root") from error
    if pid == 0:
        _run_init(init, alive, alive_writer)
    os.close(alive)
    interrupts = 0

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupts
        interrupts += 1
        # Of Ctrl-C the terminal has told the commands too.
        if interrupts > 1:
            os.kill(pid, signal.SIGKILL)
        elif number != signal.SIGINT:
            os.kill(pid, signal.SIGTERM)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        os.write(alive_writer, b"!")
        os.close(alive_writer)
        status = os.waitpid(pid, 0)[1]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return _exit_code(status)


def _unshare() -> None:
    if os.geteuid() == 0:
        kernel.unshare(kernel.CLONE_NEWPID)
        return
    # Anybody may be root in a user namespace of their own, where the system lets them.
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _run_init(init: Callable[[], int], alive: int, alive_writer: int) -> None:
    """Be the first process of the pid namespace; never returns."""
    code = 1
    try:
        os.close(alive_writer)
        kernel.die_with_parent()
        if os.read(alive, 1):  # otherwise the parent died before it was watched
            os.close(alive)
            code = init()
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
    except BaseException:  # a forked process must never return into its parent's code
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


# --- init -------------------------------------------------------------------------------------------------------------


class _Init:
    """Makes the hosts, runs the commands, and gives the children of others that have ended their rest."""

    def __init__(
        self, folder: Path, hosts: Mapping[str, HostSettings], seed: int, congestion_control: str | None
    ) -> None:
        self._folder = folder
        self._hosts = hosts
        self._seed = seed
        self._congestion_control = congestion_control
        self._ended: dict[int, int] = {}
        self._must_stop = False

    def run(self, main: Job, background: Sequence[Job]) -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
        ports, control = self._build()
        router = self._fork_router(ports, control)
        for port in ports:
            os.close(port.tun)
        control.close()
        others = [self._start(job, own_session=True) for job in background]
        command = self._start(main, own_session=False)
        while command not in self._ended and not self._must_stop:
            if router in self._ended:
                raise LabError("the lab's router has ended: see its message above")
            self._wait(None)
        self._stop({command}, signal.SIGTERM)
        self._stop(set(others), signal.SIGINT)
        return _exit_code(self._ended.get(command, signal.SIGKILL))

    def _stop(self, pids: set[int], number: signal.Signals) -> None:
        """Ask processes to end and give them a while. What still runs then is killed with the namespace."""
        for pid in pids - self._ended.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        while not self._ended.keys() >= pids and (left_s := deadline_s - time.monotonic()) > 0:
            self._wait(left_s)

    def _wait(self, timeout_s: float | None) -> None:
        """Wait for a signal, and take note of every child that has ended."""
        awaited = signal.sigwaitinfo(_AWAITED) if timeout_s is None else signal.sigtimedwait(_AWAITED, timeout_s)
        if awaited is not None and awaited.si_signo != signal.SIGCHLD:
            self._must_stop = True
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._ended[ended[0]] = ended[1]

    def _build(self) -> tuple[list[Port], socket.socket]:
        try:
            return self._try_to_build()
        except OSError as error:
            what = error.filename or "a namespace or a device"
            raise LabError(
                f"the system refused {what} ({error.strerror}): a lab needs root and {kernel.TUN}"
            ) from error

    def _try_to_build(self) -> tuple[list[Port], socket.socket]:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", Path("/"), None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("proc", Path("/proc"), "proc")
        kernel.mount("tmpfs", self._folder, "tmpfs")
        namespaces = self._folder / _NAMESPACES
        namespaces.mkdir()
        here = namespaces / OUTSIDE
        self._name_network(here)
        ports = []
        for number, name in enumerate(self._hosts):
            kernel.unshare(kernel.CLONE_NEWNET)
            self._name_network(namespaces / name)
            self._set_up_network()
            tun = kernel.open_tun(address_of(number), _NETMASK)
            address = socket.inet_aton(address_of(number))
            ports.append(Port(name=name, address=address, tun=tun, namespace=namespaces / name))
            kernel.enter_network(here)
        self._name_hosts()
        with contextlib.suppress(OSError):  # not root outside: then only our own tool enters hosts
            _IP_COMMAND_FOLDER.mkdir(exist_ok=True)
            kernel.mount(str(namespaces), _IP_COMMAND_FOLDER, None, kernel.MS_BIND | kernel.MS_REC)
        os.environ[FOLDER_VARIABLE] = str(self._folder)
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        control.bind(str(self._folder / CONTROL))
        control.listen()
        return ports, control

    def _name_network(self, path: Path) -> None:
        path.touch()
        kernel.mount("/proc/self/ns/net", path, None, kernel.MS_BIND)

    def _set_up_network(self) -> None:
        kernel.bring_up("lo")
        settings = Path("/proc/sys/net")
        # What one connection learns of a path must not change the next: runs are compared with each other.
        (settings / "ipv4/tcp_no_metrics_save").write_text("1")
        if self._congestion_control is not None:
            self._choose_congestion_control(settings / "ipv4", self._congestion_control)
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            (settings / "ipv6/conf/default/disable_ipv6").write_text("1")

    def _choose_congestion_control(self, settings: Path, name: str) -> None:
        try:
            (settings / "tcp_congestion_control").write_text(name)
        except OSError as error:
            # In any namespace but the first the kernel takes only what the machine's settings allow to everybody.
            raise LabError(
                f"the kernel refused {name} ({error.strerror}): leave --congestion-control out for the machine's own, "
                "or add it to the machine's net.ipv4.tcp_allowed_congestion_control"
            ) from error

    def _name_hosts(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{address_of(n)} {name}" for n, name in enumerate(self._hosts))]
        names = self._folder / "hosts"
        names.write_text("\n".join(lines) + "\n")
        names.chmod(0o644)
        kernel.mount(str(names), _HOSTS_FILE, None, kernel.MS_BIND)

    def _fork_router(self, ports: list[Port], control: socket.socket) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()  # Ctrl-C is not for the router
                Router(ports, self._hosts, control, self._seed).run()
            except BaseException:  # as above
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(1)
        return pid

    def _start(self, job: Job, *, own_session: bool) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = _NOT_RUN
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
                if own_session:
                    os.setsid()
                enter_host(self._folder, job.host)
                if callable(job.command):
                    code = job.command()
                else:
                    os.execvp(job.command[0], list(job.command))
            except OSError as error:
                print(f"error: can't run {job.command}: {error.strerror}", file=sys.stderr)
            except BaseException:  # as above
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        return pid
