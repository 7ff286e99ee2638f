#!/bin/sh
# Makes the data folder at the first start, as whatever user, and runs the scripts that are mounted.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    NSS_WRAPPER_PASSWD=$(mktemp) NSS_WRAPPER_GROUP=$(mktemp) # initdb wants its user to have a name
    echo "postgres:x:$(id -u):$(id -g)::/:/bin/false" >"$NSS_WRAPPER_PASSWD"
    echo "postgres:x:$(id -g):" >"$NSS_WRAPPER_GROUP"
    export NSS_WRAPPER_PASSWD NSS_WRAPPER_GROUP
    # shellcheck disable=SC2086 # several arguments
    LD_PRELOAD=$(find /usr/lib -name libnss_wrapper.so) \
        initdb --username=postgres --pwfile="$POSTGRES_PASSWORD_FILE" ${POSTGRES_INITDB_ARGS:-}
    echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
    pg_ctl --wait --options "-c listen_addresses=''" start
    for file in /docker-entrypoint-initdb.d/*.sql; do
        psql -v ON_ERROR_STOP=1 --username postgres --no-password --no-psqlrc --file "$file"
    done
    pg_ctl --wait --mode fast stop
fi
exec "$@"
