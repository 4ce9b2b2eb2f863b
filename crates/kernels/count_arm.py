#!/usr/bin/env python3
"""Counts a loop of an Arm object file: its instructions, and its cycles on several processors by llvm-mca.

    count_arm.py FILE FUNCTION [--products N] [--trips N...] [--llvm FOLDER/] [--objdump NAME]

FUNCTION is a regular expression for symbols. The loop is the smallest one with at least N multiplications.
--trips counts a nest of loops instead: the innermost loop in or around it, and as many around that as there
are numbers, which say how often the inner loops run, from the outside to the inside.
"""

import argparse
import re
import subprocess

PROCESSORS = ["neoverse-n1", "apple-m1", "neoverse-n2", "neoverse-v2", "cortex-a72"]
BRANCH = re.compile(r"(b\.\w+|b|cbn?z|tbn?z)\s+(?:.*,\s*)?([0-9a-f]+)$")
MULTIPLICATION = re.compile(r"[su](dot|mmla|mlal2?|mull2?) |bf(dot|mmla) |fmla |fmul ")
ITERATIONS = 200

Code = list[tuple[int, str]]
Loop = tuple[int, int]


def functions(path: str, objdump: str) -> dict[str, Code]:
    """The functions of an object file or archive, as (address, instruction) pairs."""
    command = [objdump, "-d", "--no-show-raw-insn", path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Code] = {}
    code: Code = []
    for line in listing.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            code = found[header[1]] = []
        elif instruction := re.match(r"\s*([0-9a-f]+):\t(.*)$", line):
            text = re.sub(r"\s*(<.*>)?\s*(//.*)?$", "", instruction[2].replace("\t", " "))
            code.append((int(instruction[1], 16), text))
    return found


def loops(code: Code) -> list[Loop]:
    """The loops, as the indices of the first and last instruction. The smallest is the first."""
    index = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for last, (_, text) in enumerate(code):
        branch = BRANCH.match(text)
        first = index.get(int(branch[2], 16), last) if branch else last
        if first < last:
            found.append((first, last))
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def trace(code: Code, loop: Loop, inner: list[Loop], trips: list[int]) -> list[str]:
    """What an iteration executes. Short forward branches are taken; others leave the loop and are not."""
    out, (i, last) = [], loop
    while i <= last:
        if inner and i == inner[0][0]:
            out += trace(code, inner[0], inner[1:], trips[1:]) * trips[0]
            i, inner = inner[0][1] + 1, []
            continue
        address, text = code[i]
        branch = BRANCH.match(text)
        # Without its target, which is outside what is counted.
        out.append(re.sub(r"[0-9a-f]+$", ".", text) if branch else text)
        i += 1
        while branch and i <= last and address < code[i][0] < int(branch[2], 16) <= address + 16:
            i += 1
    return out


def cycles(instructions: list[str], processor: str, llvm: str) -> float:
    """Cycles of one iteration, as the mean of many."""
    command = [f"{llvm}llvm-mca", "-mtriple=aarch64", "-mattr=+v8.6a,+dotprod,+i8mm,+bf16,+fullfp16"]
    command += [f"-mcpu={processor}", f"-iterations={ITERATIONS}", "-instruction-info=0"]
    code = "\n".join(instructions)
    report = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout
    total = re.search(r"Total Cycles:\s+(\d+)", report)
    assert total, report
    return int(total[1]) / ITERATIONS


def main() -> None:
    """Prints a line for each function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("function")
    parser.add_argument("--products", type=int, default=1)
    parser.add_argument("--trips", type=int, nargs="*", default=[])
    parser.add_argument("--llvm", default="", help="folder of llvm-mca, with a slash at its end")
    parser.add_argument("--objdump", default="aarch64-linux-gnu-objdump")
    options = parser.parse_args()
    for name, code in functions(options.file, options.objdump).items():
        if not re.search(options.function, name):
            continue
        nest: list[Loop] = []
        for first, last in loops(code):
            products = sum(bool(MULTIPLICATION.match(text)) for _, text in code[first : last + 1])
            if products >= options.products:
                nest = [(first, last)]
                break
        if nest and options.trips:
            first, last = nest[0]
            related = [it for it in loops(code) if it[0] <= first <= it[1] or first <= it[0] <= last]
            nest = related[: len(options.trips) + 1][::-1]
        if nest:
            instructions = trace(code, nest[0], nest[1:], options.trips)
            counts = [f"{cpu} {cycles(instructions, cpu, options.llvm):.1f}" for cpu in PROCESSORS]
            print(f"{name}: {len(instructions)} instructions; cycles: {', '.join(counts)}")


if __name__ == "__main__":
    main()
