#!/bin/sh
# Usage: isa_closed.sh ISA OBJECT...   Checks the symbols of the kernels of one instruction set:
# - visible to the linker is the table kernels_ISA and what lies in namespace fastllm::ISA, nothing else; above all
#   nothing weak or unique (W, V, u), of which the linker keeps one copy for all instruction sets;
# - called from outside are only these and what compilers emit themselves; no libm, whose bits differ by machine.
set -eu
isa=$1
shift

symbols() {  # nm's lines without address, "T name"
  nm -C "$@" | sed -nE 's/^[0-9a-f]* +([A-Za-z]) (.*)$/\1 \2/p' | sort -u
}

defined=$(symbols --defined-only "$@")
echo "$defined" | grep -q "^[DR] fastllm::kernels_$isa\$" || { echo "no table fastllm::kernels_$isa"; exit 1; }
shared=$(echo "$defined" | grep -E '^[A-Zuvw] ' |
  grep -vE "^([DR] fastllm::kernels_$isa\$|T fastllm::$isa::[a-z_]+\()" || true)
foreign=$(symbols --undefined-only "$@" |
  grep -vE "^U (fastllm::$isa::[a-z_]+\(|(memcpy|memset|memmove|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail)\$)" || true)
[ -z "$shared" ] || printf 'visible to other instruction sets:\n%s\n' "$shared"
[ -z "$foreign" ] || printf 'called from outside:\n%s\n' "$foreign"
[ -z "$shared$foreign" ]
