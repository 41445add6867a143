// Posts batches with hashicorp's go-retryablehttp as its defaults have it, which are what Kong documents of Konnect.
//
//	go_client URL CA-FILE AUTHORIZATION
//
// reads names of files from standard input, one a line, posts the bytes of each, and prints for each file its name, the
// status and the body of the response. Retries are logged on standard error. Ends with 1 if a file was not delivered.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/go-retryablehttp"
)

const workers = 4

func main() {
	url, authorization := os.Args[1], os.Args[3]
	pem, err := os.ReadFile(os.Args[2])
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		panic("no certificate in " + os.Args[2])
	}
	client := retryablehttp.NewClient()
	// Everything else is as it comes.
	client.HTTPClient.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: roots}

	names := make(chan string)
	var failed atomic.Bool
	var output sync.Mutex
	var running sync.WaitGroup
	for i := 0; i < workers; i++ {
		running.Add(1)
		go func() {
			defer running.Done()
			for name := range names {
				status, body, err := post(client, url, authorization, name)
				if err != nil || status != http.StatusOK {
					failed.Store(true)
					fmt.Fprintf(os.Stderr, "%s: not delivered: %d %v\n", name, status, err)
				}
				output.Lock()
				fmt.Printf("%s %d %s\n", name, status, body)
				output.Unlock()
			}
		}()
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		names <- lines.Text()
	}
	close(names)
	running.Wait()
	if failed.Load() {
		os.Exit(1)
	}
}

func post(client *retryablehttp.Client, url, authorization, name string) (int, []byte, error) {
	batch, err := os.ReadFile(name)
	if err != nil {
		return 0, nil, err
	}
	request, err := retryablehttp.NewRequest("POST", url, batch)
	if err != nil {
		return 0, nil, err
	}
	request.Header.Set("Authorization", authorization)
	request.Header.Set("Content-Type", "text/plain")
	request.Header.Set("Content-Encoding", "application/gzip")
	response, err := client.Do(request)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, body, err
}
