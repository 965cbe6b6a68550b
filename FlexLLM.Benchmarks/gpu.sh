#!/usr/bin/env bash
# One compact run of roofline, infer, train and serve on one device, with a JSON file for each and one table at the end. It makes
# its model on the device, reads no file, and ends within 8 minutes, warming up included: what is not done by then is left out.
#
# The program is published self-contained, so that the machine with the GPU needs no .NET:
#
#   dotnet publish FlexLLM.Benchmarks -c Release -r linux-x64 --self-contained -o published \
#       -p:UseTorchSharpPackage=true -p:LibtorchPackage=TorchSharp-cuda-linux
#
# or, where TorchSharp was built from its source, with -p:TorchSharpAssembly=FILE instead of the last line. The native library
# (libLibTorchSharp.so) then goes into the same folder, and LD_LIBRARY_PATH names the folder of the libtorch that it was built for.
# Copy the folder and this script, and run the script.
#
# Environment: PROGRAM  the published program, or a command such as "dotnet FlexLLM.Benchmarks.dll"
#              OUT      folder for the results              BACKEND  torch, or cpu for the managed backend
#              DEVICE   cuda:0, cuda:N or cpu; several, such as cuda:0,cuda:1, are a group (roofline is the first one's)
#              SHAPE    name of a model's shape, see make-model
#              MINUTES  when to give up                     QUICK    1: small numbers everywhere, to try the script
#              RATES    requests a second, such as 1,5      SECONDS_EACH  length of each serving window
#              KV       f32 or bf16: what the KV cache holds ACTIVATIONS  f32 or bf16, the same of activations;
#                       without them bf16 on GPUs, f32 elsewhere
#              DEVICE_BYTES  most bytes of an engine; empty leaves that to the engine
#
# A trial without a GPU: DEVICE=cpu BACKEND=cpu SHAPE=tiny QUICK=1 PROGRAM=... ./gpu.sh
set -euo pipefail

program=${PROGRAM:-"$(dirname "${BASH_SOURCE[0]}")/FlexLLM.Benchmarks"}
out=${OUT:-gpu-results}
device=${DEVICE:-cuda:0}
backend=${BACKEND:-torch}
shape=${SHAPE:-llama-3.1-8b}
minutes=${MINUTES:-8}
rates=${RATES:-1,5}
seconds_each=${SECONDS_EACH:-20}

# A KV cache that shrinks gives back memory in pieces, which CUDA's allocator joins only so.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

read -r -a command <<<"$program"
numbers=f32
if [[ $device == cuda* ]]; then
    numbers=bf16
fi

where=(--backend "$backend" --device "$device" --kv "${KV:-$numbers}" --activations "${ACTIVATIONS:-$numbers}")
model=("${where[@]}" --shape "$shape")

if [[ ${QUICK:-0} == 1 ]]; then
    roofline=(--copy-mib 64 --rows 128 --side 512 --repeat 2)
    infer=(--prompt 64 --decode 16 --batch 1,4 --context 32 --batch-decode 8 --repeat 1)
    train=(--tokens 64 --steps 1)
    serve=(--sample-tokens 64 --max-prompt 32 --max-answer 16 --sequences 4 --step-tokens 64 --tpot-ms 200 --ttft-ms 5000)
    seconds_each=${SECONDS_EACH:-2}
else
    roofline=()
    infer=(--prompt 1024 --chunk 1024 --decode 64 --batch 1,8,32 --context 512 --batch-decode 32)
    train=(--tokens 1024 --modules down_proj --steps 5)
    serve=(--sample-tokens 1024 --max-prompt 1024 --max-answer 256 --sequences 32 --step-tokens 1024 --tpot-ms 50 --ttft-ms 5000)
fi

serve+=(--rates "$rates" --modes co-serving,inference-only,finetune-only --seconds "$seconds_each" --drain-seconds "$seconds_each")
if [[ -n ${DEVICE_BYTES:-} ]]; then
    serve+=(--device-bytes "$DEVICE_BYTES")
fi

mkdir -p "$out"
end=$((SECONDS + minutes * 60 - 10))

# A verb that fails or runs out of time costs the others nothing.
verb() {
    local name=$1 begun=$SECONDS left=$((end - SECONDS)) code=0
    shift
    rm -f "$out/$name.json"
    if ((left <= 0)); then
        echo "--- $name: no time left"
        return
    fi

    echo "--- $name"
    timeout "$left" "${command[@]}" "$name" "$@" --json "$out/$name.json" 2>"$out/$name.log" | tee "$out/$name.txt" || code=$?
    if ((code != 0)); then
        echo "--- $name ended with $code: $(tail -n 1 "$out/$name.log")"
    fi

    echo "--- $name took $((SECONDS - begun)) s"
}

verb roofline --backend "$backend" --device "${device%%,*}" ${roofline[@]+"${roofline[@]}"}
verb infer "${model[@]}" "${infer[@]}"
verb train "${model[@]}" "${train[@]}"
verb serve "${model[@]}" "${serve[@]}"

echo
"${command[@]}" summary --in "$out" | tee "$out/summary.txt"
echo "all of it took $SECONDS s"
