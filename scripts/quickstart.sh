#!/usr/bin/env bash
# The whole system on one machine in one command: draws the demonstration set, preprocesses it, trains
# configs/demo.py, draws pictures from the EMA, and measures the result. Run again, it reuses what is there.
#   DATA=... RUN=... bash scripts/quickstart.sh    other places than data/ and runs/demo
set -euo pipefail
cd "$(dirname "$0")/.."
data="${DATA:-data}"
run="${RUN:-runs/demo}"

bash scripts/install.sh
venv="${VENV:-.venv}"
python="$venv/bin/python"
started=$SECONDS
stage() { printf '\n== %s  (%d s so far)\n' "$1" "$((SECONDS - started))"; }

stage "1/5  drawing 100 portraits: 20 compositions under 5 lights"
$python -m preprocess demo --output "$data/demo-images"

stage "2/5  preprocessing them into shards of latents, text and vision vectors"
$python -m preprocess build --input "$data/demo-images" --output "$data/demo" --resolution 128 --modulus 16 \
  --holdout 0 --vae builtin:dct --text-encoder builtin:hash --vision-encoder builtin:tone

stage "3/5  training the diffusion transformer of configs/demo.py"
$python -m fluxdit_jax.train --config=configs/demo.py --config.data.path="$data/demo" --config.workdir="$run"

stage "4/5  drawing from the EMA: from captions and vectors, under other lights, turned by words"
$python scripts/demo_sheet.py "$run" "$run/samples/quickstart.png"
$python -m fluxdit_jax.sample --workdir="$run" --out "$run/samples/sample.png" \
  --prompt "portrait of a woman with red curly hair in a green coat, looking right, in front of a brick wall" \
  --reference "$data/demo-images/c13_l3.png"

stage "5/5  the gate: does it memorise, does the vector set the light, do the words move the subject"
verdict=0
$python -m fluxdit_jax.validate --workdir="$run" || verdict=$?

stage "done"
cat <<END
pictures      $run/samples/quickstart.png, sample.png, step_*.png
report        $run/validation/report.html
TensorBoard   $venv/bin/tensorboard --logdir $run/tensorboard
EMA weights   $run/ema/
draw more     $python -m fluxdit_jax.sample --workdir=$run --prompt "..." --reference IMAGE --out picture.png
END
exit "$verdict"
