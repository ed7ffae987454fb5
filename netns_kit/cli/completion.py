"""The command line: `netns-kit completion`, what a shell needs to complete the words of `netns-kit`.

A shell is given a small script, which asks what a word may be: `netns-kit completion SHELL WORD...`.  So the parsers
of the commands alone know the options.  Where nothing is known of a word, it is completed as a file's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from . import attach, control_socket, doctor, networks, run, up
from .command_line import HOST_LOOPBACK, Parser
from .slirp4netns.command import OPTIONS

INNER = "\t"  # before the number of the word with which another program's command line begins
BASH = r"""_netns_kit() {
    local words found at
    read -ra words <<<"${COMP_LINE:0:COMP_POINT}"
    [[ ${COMP_LINE:COMP_POINT-1:1} == " " ]] && words+=("")
    mapfile -t found < <("$1" completion bash "${words[@]:1}" 2>/dev/null)
    COMPREPLY=("${found[@]%%$'\t'*}")
    [[ ${found[0]} == $'\t'* ]] || return
    at=${found[0]#$'\t'}
    COMPREPLY=()
    if declare -F _command_offset >/dev/null; then
        local COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
        _command_offset "$at"
    elif ((at + 1 == ${#words[@]})); then
        mapfile -t COMPREPLY < <(compgen -c -- "${words[at]}")
    fi
}
complete -o bashdefault -o default -F _netns_kit netns-kit"""
ZSH = r"""#compdef netns-kit
_netns_kit() {
    local -a found
    found=("${(@f)$($words[1] completion zsh "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}")
    if [[ $found[1] == $'\t'* ]]; then
        shift ${found[1]#$'\t'} words
        ((CURRENT -= ${found[1]#$'\t'}))
        _normal
    elif [[ -n $found[1] ]]; then
        found=("${(@)found//:/\\:}")
        found=("${(@)found/$'\t'/:}")
        _describe word found
    else
        _files
    fi
}
if [[ $funcstack[1] == _netns_kit ]]; then _netns_kit "$@"; else compdef _netns_kit netns-kit; fi"""
FISH = r"""function __netns_kit
    set -l words (commandline -opc)
    set -l found ($words[1] completion fish $words[2..-1] (commandline -ct) 2>/dev/null)
    if string match -q -- \t'*' $found[1]
        set -l inner (string escape -- $words[(math 1 + $found[1])..-1])
        complete -C (string join ' ' -- $inner (commandline -ct))
    else if set -q found[1]
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c netns-kit -f -a '(__netns_kit)'"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def main(words: Sequence[str]) -> int:
    """Print the script of a shell, or what a word may be; the exit status."""
    if len(words) > 1 and words[0] in SCRIPTS:
        for each in candidates(words[1:]):
            print(each)
    else:
        print(SCRIPTS[make_parser().parse_args(words).shell])
    return 0


def parsers() -> dict[str, Parser]:
    """Return the parser of each command."""
    return {
        "run": run.make_parser(),
        "doctor": doctor.make_parser(),
        "attach": attach.make_parser(),
        "up": up.make_parser(),
        **{name: make() for name, make in networks.PARSERS.items()},
        "completion": make_parser(),
        "slirp4netns": _slirp4netns_parser(),
    }


def candidates(words: Sequence[str]) -> Iterator[str]:
    """Yield what the last word may be, each with a tab and what it is for; or `INNER` and a number.

    Args:
        words: The words behind `netns-kit`.  The last one is what there is of the word to be completed.
    """
    *before, last = words or [""]
    if not before:
        found = {**run.COMMANDS, **_options(run.make_overview())}
    elif before[0] in run.COMMANDS:
        found = _found(parsers()[before[0]], before, last)
    else:
        return
    for each, about in found.items():
        if each.startswith((last, INNER)):
            yield f"{each}\t{about}".rstrip("\t")


def _found(parser: Parser, before: Sequence[str], last: str) -> dict[str, str]:
    """Return what a word may be behind a command and other words."""
    valued = {name: each for each in parser.declared for name in each.option_strings if name in parser.valued}
    valued.pop(HOST_LOOPBACK, None)
    arguments = [each for each in parser.declared if not each.option_strings]
    awaited: argparse.Action | None = None
    may_be_option = True
    for at, word in enumerate([*before[1:], last], 2):
        is_option = may_be_option and word.startswith("-") and awaited is None
        if not is_option and awaited is None and arguments and arguments[0].nargs == argparse.REMAINDER:
            return {f"{INNER}{at}": ""}
        if at > len(before):
            break
        if is_option:
            may_be_option = word != "--"
            awaited = valued.get(word)
        elif awaited is not None:
            awaited = None
        elif arguments and arguments[0].nargs != "*":
            del arguments[0]
    if awaited is None and last.startswith("-") and may_be_option:
        return _options(parser)
    return _values(awaited or (arguments[0] if arguments else None))


def _options(parser: Parser) -> dict[str, str]:
    return {name: help_of(each, parser) for each in parser.declared for name in each.option_strings}


def _values(action: argparse.Action | None) -> dict[str, str]:
    """Return what the value of an option or an argument may be, as far as it is known."""
    if action is None:
        return {}
    if action.choices is not None:
        return dict.fromkeys(map(str, action.choices), "")
    is_network = not action.option_strings and str(action.metavar).startswith("NAME")
    return dict.fromkeys(control_socket.names(), "") if is_network else {}


def help_of(action: argparse.Action, parser: Parser) -> str:
    """Return what the help says of an option or an argument."""
    return " ".join(((action.help or "") % {**vars(action), "prog": parser.prog}).split())


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "netns-kit completion",
        "bash|zsh|fish",
        description="Print a script that has a shell complete the words of netns-kit.  In ~/.bashrc, or in ~/.zshrc "
        'behind compinit, stands `eval "$(netns-kit completion bash)"` (or zsh); in ~/.config/fish/config.fish '
        "`netns-kit completion fish | source`.",
        epilog="The exit status is 125 if netns-kit failed, or if its words have a mistake.",
    )
    parser.add_argument("shell", choices=SCRIPTS, help="which shell")
    return parser


def _slirp4netns_parser() -> Parser:
    """Return a parser that knows the options of `netns-kit slirp4netns`, which reads them itself."""
    parser = Parser(
        "netns-kit slirp4netns",
        "[OPTION]... PID|PATH|FD [TAPNAME]",
        description="Give an existing network namespace connectivity, with the interface of slirp4netns.",
        epilog="The exit status is 1 if something has failed.",
    )
    for letter, names, value, said in OPTIONS:
        if letter != "h":
            flags = [f"-{letter}"] * bool(letter) + [f"--{name}" for name in names.split()]
            more = {"metavar": value} if value else {"action": "store_true"}
            parser.add_argument(*flags, help=said.replace("%", "%%"), **more)
    parser.add_argument("target", metavar="PID|PATH|FD", help="the namespace")
    parser.add_argument("tap", nargs="?", metavar="TAPNAME", help="name of the interface")
    return parser
