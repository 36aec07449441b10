"""Debian packages of any suite, from the mirror that the machine's apt uses, without touching apt's own state."""
import pathlib
import re
import subprocess
import tempfile

from .host import LabError, run, say

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def configured_sources(etc=pathlib.Path("/etc/apt")):
    """Yield (uri, suites, keyring or None) of every source of binary packages."""
    for path in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        if not path.exists():
            continue
        for line in path.read_text().splitlines():
            match = re.match(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)", line)
            if match:
                keyring = re.search(r"signed-by=(\S+)", match["options"] or "")
                yield match["uri"], [match["suite"]], keyring[1] if keyring else None
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            field = {name.lower(): value for name, value in
                     re.findall(r"^([\w-]+):[ \t]*(.*)$", stanza, re.MULTILINE)}
            if "deb" in field.get("types", "").split() and field.get("enabled", "yes") != "no":
                for uri in field.get("uris", "").split():
                    # An empty value: the key itself follows.  Debian's own keyring is used instead.
                    yield uri, field.get("suites", "").split(), field.get("signed-by") or None


def source_lines(suites, codename, sources):
    """Return sources.list lines for Debian suites, given those of the running release ``codename``."""
    found = {}
    for uri, configured, keyring in sources:
        for suite in configured:
            found.setdefault(suite, (uri, keyring or KEYRING))
    if codename not in found:
        raise LabError(f"no apt source for Debian {codename!r} is configured: kernels come from Debian's mirrors")
    lines = []
    for suite in suites:
        like = f"{codename}-security" if suite.endswith("-security") else codename
        if like in found:
            uri, keyring = found[like]
            lines.append(f"deb [signed-by={keyring}] {uri} {suite} main")
    return lines


def running_codename(path=pathlib.Path("/etc/os-release")):
    match = re.search(r'^VERSION_CODENAME="?(\w+)', path.read_text() if path.exists() else "", re.MULTILINE)
    return match[1] if match else ""


class Archive:
    """The packages of some suites, with lists and downloads in a folder of their own."""

    def __init__(self, state, suites):
        lines = source_lines(suites, running_codename(), configured_sources())
        for name in ("lists/partial", "cache/archives/partial"):
            (state / name).mkdir(parents=True, exist_ok=True)
        sources = state / f"{'+'.join(suites)}.list"
        sources.write_text("\n".join(lines) + "\n")
        self.options = ["-qq"]
        for option in (f"Dir::State::Lists={state}/lists", f"Dir::Cache={state}/cache",
                       f"Dir::Etc::sourcelist={sources}", "Dir::Etc::sourceparts=/dev/null",
                       "APT::Sandbox::User=root", "APT::Get::List-Cleanup=false", "Acquire::Languages=none",
                       "Acquire::Retries=2", "Acquire::http::Timeout=60", "Acquire::https::Timeout=60"):
            self.options += ["-o", option]

    def names(self, prefix):
        """Return the names of the packages that start with ``prefix``, from fresh lists."""
        run("apt-get", *self.options, "update")
        return run("apt-cache", *self.options, "pkgnames", prefix, stdout=subprocess.PIPE).stdout.split()

    def unpack(self, packages, folder):
        """Download packages and unpack them in the folder."""
        say("fetching " + " ".join(packages))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            run("apt-get", *self.options, "download", *packages, cwd=scratch)
            for deb in pathlib.Path(scratch).glob("*.deb"):
                run("dpkg", "-x", deb, folder)
