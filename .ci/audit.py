"""Asks a database of vulnerabilities about every release in constraints/: python audit.py PIP_AUDIT FILE…

Exit status 1 where one is known. Where the database cannot be reached, this is said aloud and the exit status is 0.
"""

import json
import subprocess
import sys


def main(pip_audit: str, *files: str) -> int:
    command = [pip_audit, "--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off"]
    status = 0
    for file in files:
        try:
            done = subprocess.run([*command, "-r", file], capture_output=True, text=True, timeout=300)
            packages = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError, subprocess.TimeoutExpired) as error:
            reason = error if isinstance(error, subprocess.TimeoutExpired) else done.stderr.strip().splitlines()[-1:]
            print(f"NOT AUDITED: {file}: the database of vulnerabilities cannot be asked ({reason}).")
            continue
        skipped = [one["name"] for one in packages if "skip_reason" in one]
        found = [one for one in packages if one.get("vulns")]
        for one in found:
            for known in one["vulns"]:
                fixed = ", ".join(known["fix_versions"]) or "no release yet"
                print(f"VULNERABLE: {file}: {one['name']} {one['version']}: {known['id']}, fixed in {fixed}")
        if skipped:
            print(
                f"NOT AUDITED: {file}: the database of vulnerabilities gave no answer about {len(skipped)} of "
                f"{len(packages)} packages, as where the network does not reach it."
            )
        else:
            print(f"{file}: {len(packages)} packages, {len(found)} with a known vulnerability")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
