#!/usr/bin/env python3
"""What a fresh stack lacks: databases with their owners, users of MLflow. Run again, it changes what differs.

    provision.py databases    PGHOST, PGPORT, PGUSER, PGPASSWORD: the superuser
                              PROVISION_MLFLOW_PASSWORD, PROVISION_SEARCH_PASSWORD: of the roles it makes
    provision.py users        MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD: an admin
                              PROVISION_WORKER_PASSWORD, PROVISION_SERVING_PASSWORD: of the users it makes

Another password in the environment is the new password from then on, which is how they are changed.
"""

from __future__ import annotations

import os
import sys

# Role -> its databases, and the variable with its password.
ROLES = {
    "mlflow": (("mlflow", "mlflow_auth"), "PROVISION_MLFLOW_PASSWORD"),
    "search": (("search",), "PROVISION_SEARCH_PASSWORD"),
}
USERS = {"worker": "PROVISION_WORKER_PASSWORD", "serving": "PROVISION_SERVING_PASSWORD"}


def main() -> None:
    steps = {"databases": databases, "users": users}
    if len(sys.argv) != 2 or sys.argv[1] not in steps:
        sys.exit(f"provision.py: found {' '.join(sys.argv[1:]) or 'nothing'}, expected one of {', '.join(steps)}")
    steps[sys.argv[1]]()


def secret(name: str) -> str:
    """A password of the environment; ends the program where there is none."""
    found = os.environ.get(name, "")
    if not found:
        sys.exit(f"provision.py: {name} is empty; set it in .env (python3 docker/make_env.py)")
    return found


def databases() -> None:
    """Roles that may log in and nothing more, each with databases that no other role may enter; nor may they enter
    those that PostgreSQL comes with."""
    import psycopg
    from psycopg import sql

    with psycopg.connect(dbname="postgres", autocommit=True) as connection:
        connection.execute("revoke connect, temporary on database postgres, template1 from public")
        for role, (names, variable) in ROLES.items():
            known = connection.execute("select 1 from pg_roles where rolname = %s", (role,)).fetchone()
            statement = "alter role {} login password {}" if known else "create role {} login password {}"
            connection.execute(sql.SQL(statement).format(sql.Identifier(role), sql.Literal(secret(variable))))
            for name in names:
                if not connection.execute("select 1 from pg_database where datname = %s", (name,)).fetchone():
                    words = sql.SQL("create database {} owner {}")
                    connection.execute(words.format(sql.Identifier(name), sql.Identifier(role)))
                connection.execute(
                    sql.SQL("revoke connect, temporary on database {} from public").format(sql.Identifier(name))
                )
            print(f"role {role} owns {', '.join(names)}")


def users() -> None:
    """Users of MLflow who are no admins."""
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    client = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    for name, variable in USERS.items():
        password = secret(variable)
        try:
            client.create_user(name, password)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                sys.exit(f"provision.py: user {name}: {error}")
            client.update_user_password(name, password)
        print(f"user {name} may log in")


if __name__ == "__main__":
    main()
