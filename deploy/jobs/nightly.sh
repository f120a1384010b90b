#!/usr/bin/env bash
# What a night runs, on the cluster. Cron, the CronJob, RayJob, RayCronJob and Airflow all come here: change it here only.
# `exec`, so that SIGTERM reaches Shoal, which then drains.
exec python -m jobs run "${1:?usage: nightly.sh JOB_FILE}"
