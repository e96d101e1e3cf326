-- The three roles of Mollifier. Run once, by a superuser, in the database that it is to live in; then
-- `mollifier migrate` as mollifier_owner; then grants.sql. Passwords are yours to set: ALTER ROLE ... PASSWORD.

CREATE ROLE mollifier_owner LOGIN;
CREATE ROLE mollifier_worker LOGIN;
CREATE ROLE mollifier_operator LOGIN;

DO $$
BEGIN
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO mollifier_owner, mollifier_worker, mollifier_operator',
                   current_database());
    EXECUTE format('GRANT CREATE ON DATABASE %I TO mollifier_owner', current_database());
END
$$;
