#!/bin/sh
# Run once, when the database is made: the role that owns it and migrates it, and the role that brokers connect as.
set -eu
psql --quiet --set ON_ERROR_STOP=1 --set owner="$OWNER_PASSWORD" --set runtime="$RUNTIME_PASSWORD" <<'SQL'
SET password_encryption = 'scram-sha-256';
CREATE ROLE wonderq_owner LOGIN PASSWORD :'owner';
CREATE ROLE wonderq_runtime LOGIN PASSWORD :'runtime';
CREATE DATABASE wonderq OWNER wonderq_owner ENCODING 'UTF8' TEMPLATE template0;
REVOKE ALL ON DATABASE wonderq FROM PUBLIC;
GRANT CONNECT ON DATABASE wonderq TO wonderq_runtime;
SQL
