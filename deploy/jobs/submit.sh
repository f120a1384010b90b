#!/usr/bin/env bash
# Submit tonight's job to the cluster that RAY_API_SERVER_ADDRESS names, wait for it, and fail unless it succeeded.
# Called by cron, the Kubernetes CronJob and Airflow. Written against Ray 2.60.
#
#   NIGHT         the night's name: it is submitted as nightly-$NIGHT, once, as Ray refuses an id that it has seen. Unset: the
#                 date in UTC, whatever the time zone of this machine or of the schedule, and for a second try of the same
#                 date <date>-2, and so on. A try beside one that still works exits 6: that one holds the lease on the output.
#   WORKING_DIR   folder to upload as the job's code. Unset where the cluster's image has Shoal installed.
#   RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, where the cluster asks for a token
set -euo pipefail

job=${1:?usage: submit.sh JOB_FILE}
here=$(dirname "$0")
id=nightly-${NIGHT:-$(date -u +%F)}
if [[ -z ${NIGHT:-} ]]; then
  first=$id
  for try in {2..99}; do
    ray job status "$id" > /dev/null 2>&1 || break # no such job, or no cluster, which submitting will say
    id=$first-$try
  done
fi

# Told to stop, stop the night too: it drains, and the next one continues.
stop_night() {
  trap '' TERM INT
  ray job stop "$id"
  exit 143
}
trap stop_night TERM INT

# A job that has 3 s to stop is killed in the middle of its slices; Shoal drains within 25 s and then merges and leaves.
ray job submit --submission-id "$id" ${WORKING_DIR:+--working-dir "$WORKING_DIR"} \
  --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}' \
  -- bash "$here/nightly.sh" "$job" &
wait $!

# `ray job submit` exits 0 for a job that somebody stopped.
status=$(ray job status "$id" 2>&1)
[[ $status == *succeeded* ]] || { echo "$status" >&2; exit 1; }
