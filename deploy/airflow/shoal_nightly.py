"""An Airflow DAG that runs Shoal every night; needs `ray[default]` and this repository on the Airflow worker.

Written against Airflow 3.1 (its standard provider) and Ray 2.60. A plain BashOperator: the script that cron uses
waits, drains when Airflow kills the task, and fails unless the night succeeded.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    dag_id="shoal_nightly",
    schedule="15 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,  # what is new is found in the corpus, not in the calendar: one run makes up for all missed ones
    max_active_runs=1,  # a second one would be refused the lease on the output, and be red
):
    BashOperator(
        task_id="submit",
        cwd="/srv/shoal",
        bash_command="exec bash deploy/jobs/submit.sh deploy/jobs/nightly.yaml",
        env={
            "WORKING_DIR": ".",
            "NIGHT": "{{ dag_run.run_after | ts_nodash }}-{{ ti.try_number }}",
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",
            "RAY_AUTH_MODE": "token",  # the token itself: ~/.ray/auth_token of Airflow's user, mode 600
        },
        append_env=True,
        retries=0,  # a night that stops at its budget fails, and a retry would have the budget again
        execution_timeout=timedelta(hours=7),  # above limits.deadline_s, which ends a night with valid output
    )
