# Debian's PostgreSQL behind the conventions of the official image that docker-compose.yml rests on.
ARG BASE
FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql libnss-wrapper \
    && rm -rf /var/lib/apt/lists/* /var/lib/postgresql/* \
    && mkdir /docker-entrypoint-initdb.d && chmod 1777 /var/lib/postgresql && chmod 3777 /var/run/postgresql \
    && sed -i "s/^#listen_addresses = 'localhost'/listen_addresses = '*'/" /usr/share/postgresql/*/postgresql.conf.sample \
    && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/
ENV PGDATA=/var/lib/postgresql/data
COPY postgres-entrypoint.sh /usr/local/bin/
VOLUME /var/lib/postgresql
STOPSIGNAL SIGINT
ENTRYPOINT ["postgres-entrypoint.sh"]
CMD ["postgres"]
