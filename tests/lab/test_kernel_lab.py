"""The lab's parts that need no QEMU: packages, kernels, the initramfs, what a guest is told."""
import fcntl
import io
import os
import pathlib
import shlex
import shutil
import subprocess

import pytest
from kernel_lab import apt, cli, guest, host, initramfs, kernels
from lab_fakes import fake_kernel

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def parse_cpio(data):
    """Return {name: (mode, contents)} of a cpio archive in the newc format."""
    found, offset = {}, 0
    while True:
        assert data[offset:offset + 6] == b"070701" and offset % 4 == 0
        fields = [int(data[offset + 6 + 8 * i:offset + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[offset + 110:offset + 110 + name_size - 1].decode()
        assert data[offset + 110 + name_size - 1] == 0
        start = (offset + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = mode, data[start:start + size]
        offset = (start + size + 3) & ~3


@pytest.fixture
def kernel(tmp_path):
    return fake_kernel(tmp_path / "cache")


@pytest.fixture
def busybox(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "busybox").write_bytes(b"\x7fELF busybox")
    (folder / "busybox").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "busybox"


def options(*arguments):
    return cli.parse_arguments([*arguments, "--", "true"])


# ---- packages

def test_apt_sources_are_read_in_both_formats(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# a comment\ndeb http://mirror/debian bookworm main contrib\ndeb-src http://mirror/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://other/x stable main\n")
    (tmp_path / "sources.list.d/a.list").write_text("deb http://mirror/security bookworm-security main\n")
    (tmp_path / "sources.list.d/b.sources").write_text(
        "Types: deb deb-src\nURIs: http://one http://two\nSuites: trixie trixie-updates\nSigned-By: /d.gpg\n\n"
        "Types: deb\nEnabled: no\nURIs: http://off\nSuites: trixie\n\n"
        "Types: deb-src\nURIs: http://sources\nSuites: trixie\n\n"
        "Types: deb\nURIs: http://inline\nSuites: sid\nSigned-By:\n -----BEGIN PGP-----\n .\n")
    assert list(apt.configured_sources(tmp_path)) == [
        ("http://mirror/debian", ["bookworm"], None),
        ("http://other/x", ["stable"], "/k.gpg"),
        ("http://mirror/security", ["bookworm-security"], None),
        ("http://one", ["trixie", "trixie-updates"], "/d.gpg"),
        ("http://two", ["trixie", "trixie-updates"], "/d.gpg"),
        ("http://inline", ["sid"], None),
    ]


def test_a_machine_without_apt_sources_has_none(tmp_path):
    assert list(apt.configured_sources(tmp_path)) == []
    assert apt.running_codename(tmp_path / "os-release") == ""


def test_other_suites_come_from_the_mirror_of_the_running_one():
    sources = [("http://x", ["stable"], None), ("http://m/debian", ["bookworm", "bookworm-updates"], "/k.gpg"),
               ("http://late", ["bookworm"], None), ("http://m/security", ["bookworm-security"], None)]
    assert apt.source_lines(["trixie", "trixie-security"], "bookworm", sources) == [
        "deb [signed-by=/k.gpg] http://m/debian trixie main",
        f"deb [signed-by={KEYRING}] http://m/security trixie-security main",
    ]
    assert apt.source_lines(["trixie", "trixie-security"], "bookworm", sources[:2]) == [
        "deb [signed-by=/k.gpg] http://m/debian trixie main"]


def test_a_machine_that_is_not_debian_is_told_so():
    with pytest.raises(host.LabError, match="no apt source for Debian"):
        apt.source_lines(["trixie"], "jammy", [("http://m/debian", ["bookworm"], None)])


def test_missing_programs_and_files_are_told_as_packages():
    assert host.missing_packages({"sh": "dash", "/": "base"}) == []
    assert host.missing_packages({"no-such-program": "p", "/no/such/file.h": "q", "nor-this": "p"}) == ["p", "q"]


def test_nothing_is_installed_without_being_asked(monkeypatch):
    monkeypatch.setattr(host, "run", lambda *argv, **kwargs: pytest.fail(f"ran {argv}"))
    host.install_packages({"sh": "dash"}, allowed=True)
    with pytest.raises(host.LabError, match="not installed: package; as root: apt-get install package .*--install"):
        host.install_packages({"no-such-program": "package"}, allowed=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(host.LabError, match="this is not root"):
        host.install_packages({"no-such-program": "package"}, allowed=True)


def test_a_helper_that_fails_or_is_missing_is_the_labs_failure():
    with pytest.raises(host.LabError, match="sh -c 'exit 3' failed with status 3"):
        host.run("sh", "-c", "exit 3")
    with pytest.raises(host.LabError, match="no-such-program is not installed"):
        host.run("no-such-program")


# ---- kernels

def test_the_newest_release_of_a_series_is_taken():
    names = ["linux-image-6.12.9-amd64", "linux-image-6.12.48+deb13-amd64", "linux-image-6.12.117+deb13-amd64",
             "linux-image-6.12.200+deb13-amd64-dbg", "linux-image-6.12.201+deb13-cloud-amd64",
             "linux-image-6.1.0-56-amd64", "linux-image-6.1.0-9-amd64", "linux-image-amd64"]
    assert kernels.newest_release("6.12", names) == "6.12.117+deb13-amd64"
    assert kernels.newest_release("6.1", names) == "6.1.0-56-amd64"
    assert kernels.newest_release("7.2", names) is None


def test_the_configuration_replaces_the_options_it_names():
    base = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\nCONFIG_AB=y\n"
    assert kernels.merged_config(base, "# why\nCONFIG_B=y\n# CONFIG_A is not set\n") == (
        "CONFIG_C=m\nCONFIG_AB=y\n# why\nCONFIG_B=y\n# CONFIG_A is not set\n")


def test_a_kernel_is_made_once_and_then_used(tmp_path, monkeypatch):
    made = []

    def fetch(cache, series, tree):
        made.append(series)
        shutil.copytree(fake_kernel(tmp_path / f"new{len(made)}", series, f"6.12.{len(made)}").folder, tree,
                        dirs_exist_ok=True)

    monkeypatch.setattr(kernels, "fetch", fetch)
    cache = tmp_path / "cache"
    for _ in range(2):
        with kernels.use(cache, "6.12") as kernel:
            assert kernel.release == "6.12.1" and kernel.image.read_bytes() == b"image"
    with kernels.use(cache, "6.12", refresh=True) as kernel:
        assert kernel.release == "6.12.2"
    assert made == ["6.12"] * 2
    assert sorted(path.name for path in cache.iterdir()) == ["kernels", "lock"]


def test_a_failing_download_leaves_nothing_and_keeps_the_old_kernel(tmp_path, kernel, monkeypatch):
    def fetch(cache, series, tree):
        (tree / "half").write_text("")
        raise host.LabError("no network")

    monkeypatch.setattr(kernels, "fetch", fetch)
    cache = tmp_path / "cache"
    for name, refresh in (("7.2", False), ("6.12", True)):
        with pytest.raises(host.LabError, match="no network"), kernels.use(cache, name, refresh):
            pass
    assert [kernel.name for kernel in kernels.cached(cache)] == ["6.12"]
    assert sorted(path.name for path in cache.iterdir()) == ["kernels", "lock"]


def test_making_removes_what_a_killed_run_left(tmp_path, monkeypatch):
    (tmp_path / "new-killed/tree").mkdir(parents=True)
    monkeypatch.setattr(kernels, "fetch", lambda cache, series, tree: (tree / "lib").mkdir())
    kernels.make(tmp_path, "6.12", refresh=False, install=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels", "lock"]


def lock_is_free(path, operation):
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def test_one_run_prepares_at_a_time(tmp_path, monkeypatch):
    states = []

    def fetch(cache, series, tree):
        states.append(lock_is_free(cache / "lock", fcntl.LOCK_EX))

    monkeypatch.setattr(kernels, "fetch", fetch)
    kernels.make(tmp_path, "6.12", refresh=False, install=False)
    assert states == [False]
    assert lock_is_free(tmp_path / "lock", fcntl.LOCK_EX)


def test_a_kernel_in_use_is_shared_and_not_replaced(tmp_path, kernel):
    with kernels.use(tmp_path / "cache", "6.12"), kernels.use(tmp_path / "cache", "6.12"):
        assert lock_is_free(kernel.folder, fcntl.LOCK_SH)
        assert not lock_is_free(kernel.folder, fcntl.LOCK_EX)
    assert lock_is_free(kernel.folder, fcntl.LOCK_EX)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", ".hidden"])
def test_names_of_kernels_are_names(tmp_path, name):
    with pytest.raises(host.LabError, match="no name of a kernel"), kernels.use(tmp_path, name):
        pass


def test_a_damaged_kernel_is_told_with_what_to_do(kernel):
    (kernel.folder / "boot" / f"vmlinuz-{kernel.release}").unlink()
    with pytest.raises(host.LabError, match="no kernel image .* --refresh"):
        kernel.image  # noqa: B018
    shutil.rmtree(kernel.folder / "lib/modules")
    with pytest.raises(host.LabError, match="damaged: remove it"):
        kernel.release  # noqa: B018


def test_the_list_tells_what_is_cached(tmp_path, capsys):
    cache = tmp_path / "cache"
    for name in ("7.2", "6.12-iommufd", "6.1", "6.12"):
        fake_kernel(cache, name)
    assert cli.main(["--list", "--cache", str(cache)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        [name, "6.12.1-amd64"] for name in ("6.1", "6.12", "6.12-iommufd", "7.2")]
    assert cli.main(["--list", "--cache", str(tmp_path / "nothing")]) == 0
    assert capsys.readouterr().out == ""


# ---- the initramfs

def test_cpio_holds_what_was_added():
    stream = io.BytesIO()
    cpio = initramfs.Cpio(stream)
    files = {"bin": (0o040755, b""), **{f"file{size}": (0o100644, b"x" * size) for size in range(9)}}
    for name, (mode, data) in files.items():
        cpio.add(name, mode, data)
    cpio.close()
    assert parse_cpio(stream.getvalue()) == files
    if shutil.which("cpio"):
        listed = subprocess.run(["cpio", "-t", "--quiet"], input=stream.getvalue(), capture_output=True, check=True)
        assert listed.stdout.decode().split() == list(files)


def test_modules_come_after_those_they_need(kernel):
    assert initramfs.module_order(kernel.modules, ["9p", "no_such", "vfio_pci", "irq"]) == [
        "kernel/irq.ko.xz", "kernel/vfio.ko.xz", "kernel/9p.ko", "kernel/vfio-pci.ko.xz"]


def test_the_initramfs_loads_unpacked_modules_in_order(kernel, busybox):
    files = parse_cpio(initramfs.build_initramfs(kernel).read_bytes())
    assert files["bin/busybox"] == (0o100755, b"\x7fELF busybox")
    assert files["init"][0] == 0o100755 and files["init"][1].startswith(b"#!/bin/busybox sh\n")
    assert files["modules/order"][1].decode().splitlines() == [
        "irq.ko ", "vfio.ko ", "9p.ko ", f"vfio-pci.ko ids={initramfs.VFIO_IDS}"]
    assert files["modules/vfio-pci.ko"] == (0o100644, b"vfio-pci")
    assert files["modules/9p.ko"] == (0o100644, b"9p")


def test_the_initramfs_is_kept_until_its_contents_change(kernel, busybox):
    first = initramfs.build_initramfs(kernel)
    stamp = first.stat().st_mtime_ns
    assert initramfs.build_initramfs(kernel) == first and first.stat().st_mtime_ns == stamp
    busybox.write_bytes(b"another")
    assert initramfs.build_initramfs(kernel) != first
    assert not list(kernel.folder.glob("*.tmp"))


def test_a_busybox_with_shared_libraries_is_refused(kernel, busybox):
    busybox.write_bytes(b"\x7fELF /lib64/ld-linux-x86-64.so.2")
    with pytest.raises(host.LabError, match="install busybox-static"):
        initramfs.build_initramfs(kernel)


# ---- what the guest is told

def test_the_command_reaches_the_guest_word_by_word(tmp_path, kernel, monkeypatch):
    folder = tmp_path / "a folder's"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WITH SPACE", "never passed")
    monkeypatch.setenv("GIVEN", "it's $HOME\n`here`")
    words = ["printf", "%s|", "a b", "it's", "$HOME", "*", "", "new\nline", "\\"]
    given = cli.parse_arguments(["--env", "GIVEN", "--env", "SET=a=b c", "--", *words])
    guest.write_control(tmp_path, given, kernel)
    script = (tmp_path / "command").read_text()
    assert f"export KERNEL_LAB={kernel.release}\n" in script and "WITH SPACE" not in script
    result = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout == "".join(f"{word}|" for word in words[2:])
    told = subprocess.run(["sh", "-c", script.replace("exec ", "pwd; printf '%s|%s' \"$GIVEN\" \"$SET\"\nexit\n")],
                          capture_output=True, text=True, check=True, cwd="/")
    assert told.stdout == f"{folder}\nit's $HOME\n`here`|a=b c"


def test_a_folder_of_the_host_is_shared_when_asked_for(tmp_path, kernel):
    guest.write_control(tmp_path, options("--out", "/a b"), kernel)
    setup = (tmp_path / "setup").read_text()
    assert "share out '/a b'\n" in setup and "lab_console" not in setup
    assert f"mount --bind {shlex.quote(f'/root{kernel.modules}')} /root/lib/modules/{kernel.release}\n" in setup


def command_line(kernel, *arguments, control=pathlib.Path("/control"), streams=(8, 9)):
    return guest.qemu_command(options(*arguments), kernel, pathlib.Path("/initramfs"), control, streams)


def values(argv, name):
    return [argv[index + 1] for index, word in enumerate(argv) if word == name]


def test_the_machine_is_the_one_the_answers_were_recorded_on(kernel):
    argv = command_line(kernel)
    assert argv[0] == "qemu-system-x86_64"
    assert values(argv, "-accel") == ["tcg,thread=multi"] and values(argv, "-machine") == ["q35"]
    assert values(argv, "-smp") == ["2"] and values(argv, "-m") == ["2G"]
    assert values(argv, "-kernel") == [str(kernel.image)] and values(argv, "-initrd") == ["/initramfs"]
    devices = values(argv, "-device")
    assert devices[0] == "intel-iommu,intremap=on,caching-mode=on,aw-bits=39"
    assert set(guest.DEVICES) <= set(devices)
    assert values(argv, "-fsdev")[0] == "local,id=host,path=/,security_model=none,multidevs=remap,readonly=on"
    assert values(argv, "-chardev") == ["socket,id=stream1,fd=8", "socket,id=stream2,fd=9"]
    assert values(argv, "-serial") == ["file:/control/console"]


def test_options_reach_the_command_line(kernel):
    argv = command_line(kernel, "--append", "a=1", "--append", "b", "--aw-bits", "48", "--mem", "4G", "--smp", "1",
                        "--qemu", "-device 'x y'", "--out", "/with,comma", "--log", "/log,file",
                        control=pathlib.Path("/c,d"))
    assert values(argv, "-append")[0].endswith(" a=1 b")
    assert "aw-bits=48" in values(argv, "-device")[0] and values(argv, "-m") == ["4G"]
    assert argv[-2:] == ["-device", "x y"]
    shared = [share.split("path=")[1].split(",sec")[0] for share in values(argv, "-fsdev")]
    assert shared == ["/", "/c,,d", "/with,,comma"]
    assert values(argv, "-serial") == ["file:/log,file"]


def test_a_shell_gets_the_console(kernel):
    given = cli.parse_arguments(["--shell"])
    argv = guest.qemu_command(given, kernel, "/initramfs", pathlib.Path("/control"), [])
    assert values(argv, "-serial") == ["mon:stdio"] and not values(argv, "-chardev")


def test_kvm_is_used_only_where_it_works(kernel, monkeypatch, tmp_path):
    assert not guest.kvm_usable(tmp_path / "none")
    monkeypatch.setattr(guest, "kvm_usable", lambda: True)
    assert values(command_line(kernel, "--accel", "kvm"), "-accel") == ["kvm"]
    assert values(command_line(kernel), "-accel") == ["tcg,thread=multi"]
    monkeypatch.setattr(guest, "kvm_usable", lambda: False)
    with pytest.raises(host.LabError, match="/dev/kvm cannot be used"):
        command_line(kernel, "--accel", "kvm")


@pytest.mark.parametrize("arguments", [
    [], ["--env", "A B=1", "true"], ["--env", "=1", "true"], ["--aw-bits", "40", "true"], ["--timeout", "-1", "true"],
    ["--boot-timeout", "soon", "true"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse_arguments(arguments)
    assert caught.value.code == 2


def test_installing_is_the_default_in_ci_only(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    assert not options().install and options("--install").install
    monkeypatch.setenv("CI", "true")
    assert options().install
