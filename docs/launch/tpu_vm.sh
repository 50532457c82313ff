#!/bin/bash
# Mixtral 8x7B on a slice of 64 v5p chips, 16 hosts of 4: bash docs/launch/tpu_vm.sh STEP, from the repository, with
# STEP one of create, install, mount, train, log, stop, copy, delete in this order.
set -euo pipefail

NAME=${NAME:-mixtral}
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-128}
IMAGE=${IMAGE:-v2-alpha-tpuv5}
SHARE=${SHARE:-10.0.0.2:/moe}

tpu() { gcloud compute tpus tpu-vm "$1" "${@:2}" --zone "$ZONE"; }
everywhere() { tpu ssh "$NAME" --worker all --command "$1"; }

case ${1:?one of create, install, mount, train, log, stop, copy, delete} in
create)
  tpu create "$NAME" --accelerator-type "$TYPE" --version "$IMAGE" --spot
  ;;
install)
  git archive --prefix moe_jax/ --output /tmp/moe_jax.tar.gz HEAD
  tpu scp /tmp/moe_jax.tar.gz "$NAME:" --worker all
  everywhere "tar xzf moe_jax.tar.gz && curl -LsSf https://astral.sh/uv/install.sh | sh &&
    cd moe_jax && ~/.local/bin/uv venv --python 3.12 &&
    ~/.local/bin/uv pip install -r requirements.txt 'jax[tpu]' -c constraints.txt"
  ;;
mount)
  everywhere "sudo apt-get update -q && sudo apt-get install -yq nfs-common && sudo mkdir -p /shared &&
    sudo mount -t nfs -o vers=4.1,hard,nconnect=8 $SHARE /shared && sudo chown \$USER /shared"
  ;;
train)
  everywhere "cd moe_jax || exit; XDG_CACHE_HOME=/shared/cache nohup .venv/bin/python train.py \
    --config configs/mixtral_8x7b.py --data.path /shared/data/corpus_32k --workdir /shared/runs/mixtral \
    --mesh.fsdp 64 --mesh.heartbeat-seconds 60 > train.out 2>&1 < /dev/null &"
  ;;
log)
  tpu ssh "$NAME" --worker 0 --command "tail -n 20 /shared/runs/mixtral/train.log moe_jax/train.out"
  ;;
stop)
  everywhere "pkill -USR1 -f '[p]ython train.py'; while pgrep -f '[p]ython train.py' > /dev/null; do sleep 5; done"
  ;;
copy)
  mkdir -p runs
  tpu scp "$NAME:/shared/runs/mixtral" runs/ --recurse --worker 0
  ;;
delete)
  tpu delete "$NAME" --quiet
  ;;
*)
  echo "error: $1 is none of create, install, mount, train, log, stop, copy, delete" >&2
  exit 2
  ;;
esac
