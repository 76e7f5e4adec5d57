#!/bin/sh
# Make what PostgreSQL shows to prove who it is, and what its clients check that with: a CA of one's own, and a
# certificate for the names that it is reached by. Where they are there already, nothing is done.
#
#   certificates.sh FOLDER NAME...
#
# ca.pem goes to every client (sslrootcert), server.pem and server.key to PostgreSQL (ssl_cert_file, ssl_key_file). The
# CA's own key is thrown away: to change the certificate, remove the folder's files and make all of them anew.
set -eu
umask 077
folder=$1
shift
[ ! -e "$folder/server.pem" ] || exit 0
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
names=$(printf ',DNS:%s' "$@")
days=3650

openssl req -x509 -newkey rsa:3072 -nodes -days $days -subj "/CN=WonderQ database CA" \
    -keyout "$made/ca.key" -out "$made/ca.pem" 2>/dev/null
openssl req -newkey rsa:3072 -nodes -subj "/CN=$1" -keyout "$made/server.key" -out "$made/server.csr" 2>/dev/null
printf 'subjectAltName=%s\nbasicConstraints=CA:FALSE\n' "${names#,}" >"$made/extensions"
openssl x509 -req -in "$made/server.csr" -CA "$made/ca.pem" -CAkey "$made/ca.key" -CAcreateserial -days $days \
    -extfile "$made/extensions" -out "$made/server.pem" 2>/dev/null

# PostgreSQL takes a key only where nobody else can read it; everybody may read what is no secret.
if [ "$(id -u)" = 0 ] && id postgres >/dev/null 2>&1; then
    chown postgres "$made/server.key"
fi
chmod 0644 "$made/ca.pem" "$made/server.pem"
mv "$made/ca.pem" "$made/server.key" "$folder/"
mv "$made/server.pem" "$folder/"  # last, because it says that all is there
chmod 0755 "$folder"
