package replication

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"sync"
	"testing"
	"time"
)

// mutual is one configuration for both ends of TLS 1.3 as nodes use it between
// themselves: both show a certificate, and both check it.
func mutual(t testing.TB) *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"node"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(c)
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: "node", RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, SessionTicketsDisabled: true,
	}
}

// BenchmarkMirror writes content that does not compress to a volume of two nodes in one
// process, over TLS and in the clear: what encryption costs, with everything else equal.
// Nodes that ship always encrypt.
func BenchmarkMirror(b *testing.B) {
	const volume = 64 << 20
	for _, load := range []struct {
		size, depth int
	}{{4 << 10, 1}, {4 << 10, 32}, {256 << 10, 16}} {
		for _, secure := range []bool{false, true} {
			b.Run(fmt.Sprintf("%dK/depth-%d/tls-%v", load.size>>10, load.depth, secure), func(b *testing.B) {
				l := newBench(b)
				l.timing = Timing{} // those of nodes that ship
				if secure {
					l.tls = mutual(b)
				}
				a, _ := l.pair(volume)
				v := a.Volume(1)
				b.SetBytes(int64(load.size))
				b.ResetTimer()
				var group sync.WaitGroup
				for worker := range load.depth {
					group.Go(func() {
						data := make([]byte, load.size)
						rand.Read(data)
						done := make(chan struct{}, 1)
						for i := worker; i < b.N; i += load.depth {
							for at := 0; at < len(data); at += 4096 { // never the same block twice
								data[at], data[at+1], data[at+2], data[at+3] = byte(i), byte(i>>8), byte(i>>16), byte(at>>12)
							}
							r := &Request{Op: OpWrite, Off: uint64(i*load.size) % volume, Len: uint64(len(data)), Data: data, Done: func(*Request) { done <- struct{}{} }}
							v.Submit(r)
							a.Kick()
							<-done
							if r.Err != nil {
								b.Error(r.Err)
								return
							}
						}
					})
				}
				group.Wait()
				b.StopTimer()
				l.equal()
			})
		}
	}
}
