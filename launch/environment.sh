# Sourced by the other scripts: makes the virtual environment once and installs the package into it.
#
#   VENV=DIR      where (default: .venv in the repository)
#   PYTHON=EXE    which Python makes it (default: python3; 3.10 or newer)
#   EXTRAS=a,b    optional dependencies of pyproject.toml to install as well
#   PACKAGES="…"  Debian packages that the script needs; installed where this is root, else named

cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
VENV=${VENV:-$PWD/.venv}
PYTHON=${PYTHON:-python3}

missing=()
for package in ${PACKAGES:-}; do
    command -v dpkg-query >/dev/null || break # not Debian: the user knows the names there
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
    if [[ $(id -u) == 0 ]]; then
        echo "Installing Debian packages: ${missing[*]}"
        { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"; } >/dev/null
    else
        echo "Some parts need Debian packages that only root can install: sudo apt-get install ${missing[*]}" >&2
    fi
fi

# pesq, of the quality extra, is compiled where it is installed.
if [[ ",${EXTRAS:-}," == *,quality,* ]] && ! command -v cc >/dev/null; then
    echo "No C compiler: speech is not scored (sudo apt-get install gcc python3-dev, then start this again)" >&2
    EXTRAS=$(tr ',' '\n' <<<"$EXTRAS" | grep -vx quality | paste -sd,)
fi

# The environment is made again only when what goes into it has changed.
wanted=$(cat pyproject.toml - <<<"$PYTHON ${EXTRAS:-}" | sha256sum)
if [[ ! -x $VENV/bin/python || $(cat "$VENV/installed" 2>/dev/null) != "$wanted" ]]; then
    echo "Installing into $VENV (torch is large: some minutes)"
    "$PYTHON" -m venv "$VENV"
    # Older versions of pip try many combinations of versions one by one, which takes many minutes here.
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check --upgrade pip
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}"
    # Speaker similarity. Its own list of dependencies names one that does not build; the quality extra has the rest.
    [[ ",${EXTRAS:-}," != *,quality,* && ",${EXTRAS:-}," != *,dev,* ]] ||
        "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-deps "resemblyzer>=0.1.4"
    echo "$wanted" >"$VENV/installed"
fi
