#!/usr/bin/env bash
# What a night runs, on the cluster. Cron, the CronJob, RayJob, RayCronJob and Airflow all come here: change it here only.
# Answers what is new or changed, under a lease on the output, so that two nights never overlap, whoever started them.
# `exec`, so that SIGTERM reaches Shoal, which then drains.
exec python -m jobs nightly "${1:?usage: nightly.sh JOB_FILE}"
