-- The databases and roles of the ledger and of Airflow, with the passwords that lie in /run/secrets.
--
-- PostgreSQL's image runs this when it makes its data folder. It may run again: what is there stays, and every role
-- gets the password that its file holds now (docs/operations.md, "Rotate secrets").
\set ON_ERROR_STOP on
\set superuser_password `cat /run/secrets/postgres_password`
\set owner_password `cat /run/secrets/owner_password`
\set dag_password `cat /run/secrets/dag_password`
\set worker_password `cat /run/secrets/worker_password`
\set airflow_password `cat /run/secrets/airflow_password`

-- Statements with passwords in them are never logged, not even if they fail.
SET log_min_error_statement = panic;
SET log_statement = 'none';

SELECT format('CREATE ROLE %I LOGIN', name)
  FROM unnest(ARRAY['virnucpro_owner', 'virnucpro_dag', 'virnucpro_worker', 'airflow']) AS name
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
\gexec
ALTER ROLE CURRENT_USER PASSWORD :'superuser_password';
ALTER ROLE virnucpro_owner PASSWORD :'owner_password';
ALTER ROLE virnucpro_dag PASSWORD :'dag_password';
ALTER ROLE virnucpro_worker PASSWORD :'worker_password';
ALTER ROLE airflow PASSWORD :'airflow_password';

SELECT format('CREATE DATABASE %I OWNER %I', name, owner)
  FROM (VALUES ('virnucpro', 'virnucpro_owner'), ('airflow', 'airflow')) AS wanted (name, owner)
 WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name)
\gexec
REVOKE ALL ON DATABASE virnucpro, airflow FROM PUBLIC;
GRANT CONNECT ON DATABASE virnucpro TO virnucpro_dag, virnucpro_worker;
